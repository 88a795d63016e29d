"""The configuration: what keys there are, YAML files with inheritance, the command line.

`get_config` starts from the defaults of the task's keys (see `keys`), merges the files a config is based on, the config
itself, and `KEY VALUE` pairs.  Every key and every value is checked; what does not fit is a UserError.
"""

from vmamba.config.command_line import argument_parser, config_from_args
from vmamba.config.merge import changed, get_config, image_size, output_folder, restored, save_config, sides

__all__ = [
    "argument_parser",
    "changed",
    "config_from_args",
    "get_config",
    "image_size",
    "output_folder",
    "restored",
    "save_config",
    "sides",
]
