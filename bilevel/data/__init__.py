"""Tables of data: where they come from, how they are prepared, and how they are split."""

from bilevel.data.load import Dataset as Dataset
from bilevel.data.load import available as available
from bilevel.data.load import load as load
