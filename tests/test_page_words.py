"""The page's words for each plot, and what it says of a published file that was edited by hand."""

import re

import pytest

from shared.errors import DataError
from tests.test_page import PAGE, parts, report
from tests.test_page import small as small


@pytest.mark.parametrize(
    ("file", "old", "new", "said"),
    [("results.csv", "paper,config", "paper,name", "columns"), ("results.csv", ",generic.accuracy,0", ",x,y0", "value"),
     ("claims.md", "| verdict |", "| verdict | more |", "a row has 6 cells, the head 7")],
)  # fmt: skip
def test_a_published_file_that_was_edited_by_hand_is_one_line(small, file, old, new, said):
    path = small / "results" / "fedloge" / "mini" / file
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(DataError, match=re.escape(said)):
        report.build(small)


def test_a_plots_words_are_those_of_its_own_study():
    readme = "![a, MNIST](../results/x/one/plots/ladder.png)\n![b](../results/x/two/plots/ladder.png)\n"
    titles = parts.image_titles(readme)
    assert titles == {"one/ladder": "a, MNIST", "two/ladder": "b"}
    own = {"mnist": "MNIST", "fashion-mnist": "Fashion-MNIST", "cifar10": "CIFAR-10"}
    title = rf'<title id="lightcnn-(?:budget-)?({"|".join(own)})-[a-z_-]+-title">([^<]*)<'
    found = re.findall(title, PAGE.read_text("utf-8"))
    assert {study for study, _ in found} == set(own)
    for study, title in found:
        for other in set(own) - {study}:
            assert not re.search(rf"(?<![\w-]){own[other]}", title)
