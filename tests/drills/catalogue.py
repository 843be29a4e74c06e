"""All drills, in the order of the table."""

from tests.drills import bounds, errors, fetching, lifecycle, losses, obstacles, outage, sharing

DRILLS = (
    *lifecycle.DRILLS,
    *bounds.DRILLS,
    *errors.DRILLS,
    *obstacles.DRILLS,
    *fetching.DRILLS,
    *sharing.DRILLS,
    *losses.DRILLS,
    *outage.DRILLS,
)
