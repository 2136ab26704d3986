"""Can the server draw a client's private images from the diffusion model that the client tuned on them?

Expect: in part. It sent the model from which the client began and received the one that came back, so it can guide its
samples from the one beyond the other (FineXtract): two to four times as many are then nearer to a private image than to
any other picture of the subject or of others, as of samples of the tuned model alone, with classifier-free guidance or
without. How many are copies that anybody would recognise depends on how long the client tuned. Likeness alone proves
nothing, since two pictures of one thing are alike: read the gap to pictures of the same thing that nobody tuned on. A
caption that is not announced stands in the weights.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedtap.scenarios.checkpoints.extraction import Extracting


@dataclass(frozen=True)
class Finextract(Extracting):
    """Clients tune all weights on four images each; `--private 4,8` and `--method full,lora` widen it."""
