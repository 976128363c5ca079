"""One file per finding, each with `section()`, what the page shows of it, and `block(panel, room)`, what it says of one loss."""

from . import candidates, curve, distribution, generalisation, helping, layers, oscillation, peaks, units

SECTIONS = (curve, layers, helping, distribution, oscillation, units, peaks, generalisation, candidates)
