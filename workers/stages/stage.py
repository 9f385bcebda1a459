"""Stage: any stage of a rank, and who has its requests in it."""

from __future__ import annotations

from workers.stages.rank_stages import Connected, Joined, Loaded, Prepared
from workers.stages.resharding import Unsharded

Stage = Prepared | Loaded | Unsharded | Connected | Joined


def holder_of(stage: Stage | None) -> Loaded | Unsharded | None:
    """Return who has the rank's requests and mail; nobody has before it has loaded."""
    match stage:
        case Loaded() | Unsharded() as holder:
            return holder
        case Connected(loaded=loaded) | Joined(connected=Connected(loaded=loaded)):
            return loaded
    return None
