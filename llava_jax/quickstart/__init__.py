"""The pretrained parts and the data of the laptop run, made from installed Python packages."""
