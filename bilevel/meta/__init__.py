"""Meta-learning: weights from which a model adapts to new tasks in a few steps, as hyperparameters."""

from bilevel.meta.evaluation import Evaluation as Evaluation
from bilevel.meta.evaluation import Score as Score
from bilevel.meta.evaluation import evaluate as evaluate
from bilevel.meta.glyphs import GlyphProblem as GlyphProblem
from bilevel.meta.glyphs import GlyphTasks as GlyphTasks
from bilevel.meta.glyphs import glyphs as glyphs
from bilevel.meta.problem import MetaProblem as MetaProblem
from bilevel.meta.problem import squared_norm as squared_norm
from bilevel.meta.sine import SineProblem as SineProblem
from bilevel.meta.sine import SineTasks as SineTasks
from bilevel.meta.tasks import Tasks as Tasks
