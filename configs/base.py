"""Every option of train.py with its default. A recipe is a small difference on this file."""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

FREE = (
    "trainable",
    "data.columns",
)  # sections whose keys are up to the recipe; see llava_jax/command.py


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.workdir = ""  # where the run lives; an unfinished run found there is resumed
    config.seed = 0

    # The model's shape: a name from llava_jax/models/presets.py, or empty: as init.checkpoint has
    # it, or composed from the folders init.vision and init.decoder. None: as the shape says.
    config.model = ConfigDict()
    config.model.preset = ""
    config.model.projector = placeholder(str)  # linear | mlpNx_gelu | identity
    config.model.feature_layer = placeholder(int)  # of the encoder's hidden states; LLaVA: -2
    config.model.image_size = placeholder(int)  # pixels a side
    config.model.image_mode = placeholder(str)  # square | pad | resize | anyres
    # Of image_mode anyres, which cuts pictures into tiles; see llava_jax/models/anyres.py.
    config.model.tiling = ConfigDict()
    # Columns x rows of tiles: "1x2 2x1 2x2", or "1x1..6x6" for all between; the first wins a tie.
    config.model.tiling.grids = placeholder(str)
    config.model.tiling.merge = placeholder(str)  # spatial_unpad (with a newline) | spatial | flat
    config.model.tiling.cap = placeholder(int)  # N: shrink features to about N tiles; 0: never
    config.model.tiling.one_view = placeholder(bool)  # of several pictures each is one tile
    # How videos become tokens; if any is set the model takes videos. See llava_jax/models/video.py
    config.model.video = ConfigDict()
    config.model.video.mode = placeholder(str)  # of a frame: square | pad | resize
    config.model.video.pool = placeholder(str)  # bilinear | average | average_before_projector
    config.model.video.newline = placeholder(str)  # no_token | one_token | frame | grid
    config.model.video.frames = placeholder(int)  # sampled when the model is asked
    config.model.video.time_instruction = placeholder(bool)  # times of the frames in the question
    config.model.template = "v1"
    config.model.dtype = "auto"  # float32 | mixed (float32, bfloat16 products) | bfloat16 | auto
    # int8: of the language model's kernels, none of which may train then; None: as they are
    config.model.quantize = placeholder(str)
    # xla | blocks (of long rows) | cudnn (GPU) | splash (TPU) | auto: by the devices and the length
    config.model.attention = "auto"
    # none | linear | attention | full: from most memory and least compute to the opposite. linear
    # keeps the results of linear layers and of attention (not of cuDNN's), attention only those.
    config.model.remat_policy = "linear"

    # Where parameters start: Hugging Face folders, or the run directory of an earlier stage.
    config.init = ConfigDict()
    config.init.vision = ""
    config.init.decoder = ""
    config.init.checkpoint = ""  # whole model; the two above replace parts of it
    config.init.tokenizer = ""  # empty: the one of init.checkpoint, else of init.decoder

    # What trains, as path prefix -> peak learning rate; everything else is frozen.
    config.trainable = ConfigDict({"projector": 1e-3})

    # Low-rank updates of linear layers: trained where `trainable` names lora, or a part of it such
    # as lora/decoder. Targets are shell patterns of the layers' paths.
    config.lora = ConfigDict()
    config.lora.rank = 0  # 0: none
    config.lora.alpha = 16.0  # an update weighs alpha / rank
    config.lora.targets = ("decoder/layers/*",)
    config.lora.dropout = 0.0  # share of an update's inputs left out, in training

    config.data = ConfigDict()
    # A .json, .jsonl, .parquet or .tar file, a pattern of the last two, a .yaml mixture of data
    # sets, or a folder: of Parquet files or tars, or one made by `llava-jax build`. These, and
    # image_root, may be URLs that begin with gs://, s3:// or hf://.
    config.data.train = ""
    config.data.validation = ""  # the same, held out; empty: none
    config.data.train_split = placeholder(str)  # of a folder; None: train
    config.data.validation_split = placeholder(str)
    # Names of id, image, video, system, conversations, question and answer, where the data have
    # others: {"question": "query", "answer": "label"}.
    config.data.columns = ConfigDict()
    config.data.image_root = ""  # folder that image paths are relative to
    config.data.max_length = 2048  # tokens of a conversation; a longer one loses its end
    config.data.row_length = placeholder(int)  # tokens a row; None: max_length
    config.data.images_per_row = 4  # counts tiles, where pictures are cut into several
    # Frames of a video in training: as many, evenly spread, or so many a second and no more than
    # video_frames, if it is not 0. None: as the model has it.
    config.data.video_frames = placeholder(int)
    config.data.video_fps = placeholder(float)
    config.data.max_tiles = placeholder(int)  # of a picture besides its base view; None: all
    config.data.packing = True  # several conversations a row
    # conversation | independent: each question of a record sees the images and itself alone.
    config.data.turns = "conversation"
    # original: with template chatml, what LLaVA-NeXT learns besides the answers: headers and marks.
    config.data.labels = placeholder(str)
    # How boxes of records are written, as llava_jax/data/boxes.py has it.
    config.data.box_convention = "llava"  # llava | qwen_1000 | kosmos | pixel
    # Random changes of training pictures, and of their boxes; see llava_jax/data/augment.py.
    config.data.flip = 0.0  # share that is mirrored
    config.data.crop = 0.0  # largest share of a side that is cut away
    config.data.bad_image = "error"  # error | skip: for images that cannot be read
    config.data.bad_image_ceiling = 0  # with skip: how many are too many
    config.data.workers = 0  # processes that decode images; 0: threads

    # What a frozen encoder sees of each picture is computed once and kept here; steps are then
    # without the encoder. Empty: off. See llava_jax/data/features.py.
    config.features = ConfigDict()
    config.features.folder = ""  # may be that of several runs, which share what they have stored
    config.features.gigabytes = 100.0  # that the folder may take

    config.batch_size = 32  # rows an optimizer step, over all devices and microbatches
    config.accumulation = 1  # microbatches of a step; fewer where a device would get no row
    config.epochs = placeholder(int)  # give epochs or steps
    config.steps = placeholder(int)

    config.optimizer = ConfigDict()
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.999
    config.optimizer.eps = 1e-8
    config.optimizer.weight_decay = 0.0
    config.optimizer.clip_norm = 1.0  # 0: no clipping
    config.optimizer.warmup_ratio = 0.03
    config.optimizer.moments_dtype = "float32"  # | bfloat16 (stochastic rounding): half the memory
    # As the original LLaVA: each eighth of a batch (one of its 8 GPUs) weighs the same in the loss,
    # however many tokens it has, and gradients are not clipped.
    config.parity = False
    # answers: their tokens are learnt | dpo: of the two answers that each record has the chosen one
    # is made likelier than the rejected one; see llava_jax/training/preferences.py.
    config.loss = "answers"
    config.dpo = ConfigDict()
    config.dpo.beta = 0.1  # the larger, the closer the model stays to the one that it starts from
    config.loss_chunk = 64  # positions a row whose logits exist at once

    # Mesh axes: copies of the weights, shards of each copy, devices that share a layer's products;
    # -1 takes the devices that the others leave.
    config.mesh = ConfigDict({"data": 1, "fsdp": -1, "tensor": 1})

    config.log_every = 10
    config.validate_every = 500
    config.samples = 4  # held-out records that are answered at each validation
    config.sample_tokens = 32
    config.save_every = 500
    config.keep = 2  # newest checkpoints kept
    config.wandb_project = ""  # empty: no W&B
    return config
