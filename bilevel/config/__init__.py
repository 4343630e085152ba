"""Configs: YAML -> typed objects. Every mistake is one sentence that says where, what is allowed and what was given."""

from bilevel.config.document import ConfigError as ConfigError
from bilevel.config.load import choose_device as choose_device
from bilevel.config.load import load_plan as load_plan
from bilevel.config.setups import DataSetup as DataSetup
