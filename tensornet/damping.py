"""Damping constants: fractions of the mean diagonal that are added to the diagonal of a second moment.

The weight of a layer has two moments. The row moment is computed from the gradients of the layer's outputs,
the column moment from its inputs. Pairs of dampings list the row moment first. When networks are chosen and
fitted, `MOMENT_DAMPING` is the damping of the row moment.
"""

#: Damping of the row moment when networks are chosen and fitted. With less, plans depend more on the
#: calibration text.
MOMENT_DAMPING = 0.1
#: Damping of the row and the column moment when weights are rounded, for moments computed from data. The row
#: moment needs more damping, since gradients vary more between texts than inputs do. If both moments are
#: estimated from a few random gradients (`rounded_cores.seen_moments`), both get the damping of rows.
ROW_DAMPING, COLUMN_DAMPING = 0.1, 0.01
#: Damping of the row moment when a dense matrix is rounded, in addition to `MOMENT_DAMPING`.
#: Rounding moves errors into directions with small moments, in which another text may have larger gradients.
#: Without this damping, two-sided rounding halves the predicted loss increase of a language model, but hardly
#: lowers the measured loss increase (docs/planning.md).
DENSE_ROW_DAMPING = 0.8
#: Damping of the column moment when a dense matrix is rounded with one-sided feedback. It is larger than
#: `COLUMN_DAMPING`, since errors move into directions in which few tokens have large inputs. For a moment of
#: `in` inputs and `n` tokens, the best damping on another text was about `0.3 in / n`.
DENSE_COLUMN_DAMPING = 0.05
#: Damping of the row moment when a loss increase is predicted. Decompositions are best with little damping,
#: but predictions with little damping are too low. On another text, and with all layers compressed at once,
#: errors in directions of small gradients increase the loss too. The trace of the moment is kept constant: a
#: larger trace would double the predicted loss increase of integer formats, whose errors lie in all
#: directions.
FORECAST_ROW_DAMPING = 1.0
#: Damping of moments that may be singular when networks are fitted. These are the column moment, if an input
#: is always 0, and the moments of single legs.
FIT_DAMPING = 1e-4
#: Smallest damping, used for moments that are already damped. Without it, errors in directions without data
#: would have no weight.
LEAST_DAMPING = 1e-6
