"""Every claim's sides and limits, written down a second time: `tests/claims.txt` says what each compares.

Texts of published studies are made from `claims.py` itself, so no table would show that two sides were swapped. Who
changes a claim changes its line there, and reads it once more beside the claim's words.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from fedloge import claims as fedloge
from lightcnn import claims as lightcnn
from mdcs import claims as mdcs
from shared.claims import Claim, Fact
from sparsevit import claims as sparsevit

PINNED = Path(__file__).with_name("claims.txt")


def claims() -> Iterator[tuple[str, Sequence[Claim]]]:
    """The claims of each paper, under the settings that its published and its paper's studies have."""
    yield "fedloge, mini", fedloge.all_claims(10, 64, 0.6, fedbn=True)
    yield "mdcs", mdcs.ALL_CLAIMS
    yield "lightcnn, fashion_mnist", lightcnn.all_claims("fashion_mnist", 1)
    yield "lightcnn, mnist", lightcnn.accuracy_claims("mnist")
    yield "lightcnn, cifar10", lightcnn.all_claims("cifar10", 3)
    yield "lightcnn, budget_mnist", lightcnn.budget_claims("mnist", 1)
    yield "lightcnn, budget_cifar10", lightcnn.budget_claims("cifar10", 3)
    yield "lightcnn, peers", lightcnn.peer_claims(["squeezenet"])
    yield "sparsevit, mini", sparsevit.all_claims("mini", 17)
    yield "sparsevit, cifar100_authors", sparsevit.all_claims("cifar100_authors", 577)


def line_of(claim: Claim) -> str:
    """Sides or limit, and the claim's words."""
    if isinstance(claim, Fact):
        limit = f"{claim.value:.10g}" + (f" (within {claim.tolerance:g})" if claim.tolerance else "")
        return f"{claim.figure} {claim.relation} {limit}: {claim.text}"
    right = " or ".join(map(str, claim.right)) if isinstance(claim.right, tuple) else f"{claim.right}"
    return f"{claim.left} > {right}: {claim.text}"


def told() -> str:
    """All claims as `claims.txt` has them."""
    return "".join(f"[{name}]\n" + "".join(f"{line_of(claim)}\n" for claim in found) + "\n" for name, found in claims())


def test_the_sides_and_limits_of_every_claim_are_those_that_were_written_down():
    wanted, found = PINNED.read_text(encoding="utf-8").splitlines(), told().splitlines()
    missing = [line for line in wanted if line not in found]
    new = [line for line in found if line not in wanted]
    assert (missing, new) == ([], [])
    assert wanted == found
