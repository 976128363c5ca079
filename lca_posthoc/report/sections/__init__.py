"""One file per finding: `section()` returns its title and figures, `block(panel, room)` its content
for one loss.
"""

from . import (
    candidates,
    curve,
    distribution,
    generalisation,
    helping,
    layers,
    oscillation,
    peaks,
    units,
)

SECTIONS = (
    curve,
    layers,
    helping,
    distribution,
    oscillation,
    units,
    peaks,
    generalisation,
    candidates,
)
