"""The logs of a run: metrics.jsonl, samples.jsonl, TensorBoard events, W&B on request, loss.png."""

import json
import time
from pathlib import Path

from ml_collections import ConfigDict

from llava_jax.files import json_line, whole_file
from llava_jax.imports import hidden
from llava_jax.parallel import hosts

with hidden("torch"):
    from tensorboardX import summary
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog


def open_log(config: ConfigDict, step: int) -> "MetricsLog | NoLog":
    """The log of a run that starts or resumes at `step`; the first process alone keeps one."""
    if not hosts.is_first():
        return NoLog()
    return MetricsLog(Path(config.workdir), step, config.wandb_project, config.to_dict())


class MetricsLog:
    """Appends to a run's logs; after a resume they read as if the run had never stopped.

    Args:
      workdir: the run directory.
      resume_step: lines of later steps, written before a kill, are dropped; they come again.
      wandb_project: also log there, if not empty.
      config: the recipe, for W&B.
    """

    def __init__(self, workdir: Path, resume_step: int, wandb_project: str, config: dict):
        self._files = {}
        for name in ("metrics", "samples"):
            path = workdir / f"{name}.jsonl"
            drop_later_lines(path, resume_step)
            self._files[name] = open(path, "ab")
        self._events = TensorBoardEvents(workdir / "tensorboard", resume_step + 1)
        self._wandb = _start_wandb(wandb_project, workdir, config) if wandb_project else None

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self._append("metrics", {"step": step, **values})
        self._events.add(step, *(summary.scalar(name, value) for name, value in values.items()))
        if self._wandb:
            self._wandb.log(values, step=step)

    def sample(self, step: int, values: dict[str, str]) -> None:
        """One generation during training: id, prompt, prediction, reference."""
        self._append("samples", {"step": step, **values})
        text = "  \n".join(f"{name}: {value}" for name, value in values.items())
        text = text.encode(errors="backslashreplace").decode()  # it may hold half a character
        self._events.add(step, summary.text(f"samples/{values['id']}", text))

    def _append(self, name: str, line: dict) -> None:
        self._files[name].write(json_line(line))
        self._files[name].flush()

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._events.close()
        if self._wandb:
            self._wandb.finish()


class TensorBoardEvents:
    """An event file, written to disk as it grows.

    tensorboardX's own SummaryWriter writes in a thread. When the disk is full that thread ends, and
    the run would wait for ever at the next numbers; here it ends with an error.

    Args:
      purge_step: TensorBoard forgets what earlier files say of it and later steps.
    """

    def __init__(self, folder: Path, purge_step: int):
        folder.mkdir(exist_ok=True)
        self._writer = EventsWriter(str(folder / "events"))
        start = SessionLog(status=SessionLog.START)
        self._write(Event(step=purge_step, session_log=start))
        self._writer.flush()

    def add(self, step: int, *summaries) -> None:
        for one in summaries:
            self._write(Event(step=step, summary=one))
        self._writer.flush()

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        self._writer.write_event(event)

    def close(self) -> None:
        self._writer.close()


class NoLog:
    """Has the methods of a `MetricsLog` and keeps nothing: for all processes but the first."""

    def scalars(self, step: int, values: dict[str, float]) -> None:
        pass

    def sample(self, step: int, values: dict[str, str]) -> None:
        pass

    def close(self) -> None:
        pass


def _start_wandb(project: str, workdir: Path, config: dict):
    import wandb

    return wandb.init(project=project, name=workdir.name, dir=workdir, config=config)


def drop_later_lines(path: Path, last_step: int) -> None:
    """Keeps the lines of a log up to `last_step`; a line cut by a kill is dropped.

    So is a line that is no line of a log, which a crash of the machine may leave; that is reported.
    """
    if not path.exists():
        return
    lines = [(line, _parsed(line)) for line in _whole_lines(path)]
    if broken := sum(values is None for _, values in lines):
        hosts.report(f"{path}: {broken} of {len(lines)} lines are damaged and left out")
    kept = [line for line, values in lines if values and values["step"] <= last_step]
    with whole_file(path) as file:
        file.writelines(line + b"\n" for line in kept)


def read_log(path: Path) -> list[dict]:
    """The lines of a .jsonl log, without an unfinished last one and without damaged ones."""
    return [values for values in map(_parsed, _whole_lines(path)) if values]


def _parsed(line: bytes) -> dict | None:
    """The values of one line, or None if it is damaged."""
    try:
        values = json.loads(line)
    except ValueError:
        return None
    return values if isinstance(values, dict) and isinstance(values.get("step"), int) else None


def _whole_lines(path: Path) -> list[bytes]:
    # Bytes: a kill may cut a character, and text has more line endings than a log.
    return path.read_bytes().split(b"\n")[:-1]


def last_losses(path: Path) -> str:
    """The latest losses in a log: `loss 0.1234, validation loss 0.2345`."""
    shown = ("loss", "validation_loss")
    last = {name: value for line in read_log(path) for name, value in line.items() if name in shown}
    return ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in last.items())


def plot_losses(metrics_file: Path, out: Path) -> None:
    """Training and held-out loss, and the learning rates, over steps."""
    import matplotlib  # a second, at the end of a run only

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    lines = read_log(metrics_file)
    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(8, 6), sharex=True, height_ratios=(3, 1), constrained_layout=True
    )
    for name, style in (("loss", "-"), ("validation_loss", "o-")):
        points = [(line["step"], line[name]) for line in lines if name in line]
        if points:
            top.plot(*zip(*points, strict=True), style, label=name.replace("_", " "))
    top.set(ylabel="loss (nats)", yscale="log", title=metrics_file.parent.name)
    top.grid(alpha=0.3)
    top.legend()
    rates = sorted({name for line in lines for name in line if name.startswith("learning_rate/")})
    for name in rates:
        points = [(line["step"], line[name]) for line in lines if name in line]
        bottom.plot(*zip(*points, strict=True), label=name.removeprefix("learning_rate/"))
    bottom.set(xlabel="step", ylabel="learning rate")
    bottom.grid(alpha=0.3)
    bottom.legend()
    figure.savefig(out, dpi=120)
    plt.close(figure)
