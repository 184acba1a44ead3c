"""Damping: which fraction of the mean diagonal is added to the diagonal of a second moment, and why.

A layer has two moments: that of its rows, from the gradients of its outputs, and that of its columns, from
its inputs. Where both are damped, the rows come first. `CompressionConfig.damping` is the damping of rows
for choosing and fitting networks.
"""

#: Damping of rows and of columns in rounding, for moments from data. Moments of rows need more, since
#: gradients differ more between texts than inputs do. Moments that are estimated from a few random
#: gradients (`rounded_cores.seen_moments`) are damped like rows on both sides.
ROW_DAMPING, COLUMN_DAMPING = 0.1, 0.01
#: Additional damping of rows when a dense matrix is rounded; `CompressionConfig.damping` was applied
#: before. Rounding moves errors into directions with small moments, in which another text may have larger
#: gradients. Without this damping, two-sided rounding halves the predicted loss increase of a language
#: model, but hardly lowers the measured loss increase (benchmarks/records/bytes.md).
DENSE_ROW_DAMPING = 0.8
#: Damping of rows for predictions of the loss. Decompositions are best with little damping, but predictions
#: with little damping are too low: on another text, and with all layers compressed at once, errors in
#: directions of small gradients increase the loss too. The trace of the moment is kept constant, since a
#: larger trace would double the predicted loss of integers, whose errors lie in all directions.
FORECAST_ROW_DAMPING = 1.0
#: Damping of moments that may be singular, when networks are fitted: of columns, for inputs that are 0, and
#: of the moments of legs.
FIT_DAMPING = 1e-4
#: Smallest damping, of moments that are already damped, and of rows if `CompressionConfig.damping` is 0:
#: errors in directions without data must not count as nothing.
LEAST_DAMPING = 1e-6
