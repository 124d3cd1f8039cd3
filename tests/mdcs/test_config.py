"""The configuration: what each method decides of the run, short forms, and one located line for every mistake."""

import re

import pytest

from mdcs.config import Config
from shared.config import dump, load, parse
from shared.errors import ConfigError

SAMPLE = """paper: mdcs
data:
  name: sample
  mean: [0.286]
  std: [0.353]
  augment: grey
model: {name: resnet_cifar, depth: 8, width: 4}
method: mdcs
optimizer: {lr: 0.05}
schedule: {name: step, milestones: [2, 3]}
epochs: 4
batch_size: 32
"""
FILES = """paper: mdcs
data:
  name: list
  train_list: train.txt
  test_list: test.txt
  image_root: images
  num_classes: 3
  mean: [0.5, 0.5, 0.5]
  std: [0.2, 0.2, 0.2]
  augment: photo
model: {name: resnet50}
optimizer: {lr: 0.05}
schedule: cosine
epochs: 4
batch_size: 32
"""
METHODS = {  # views and experts of each method by its name alone
    "mdcs": ("both", 3), "dl": ("weak", 3), "ce": ("weak", 1), "balanced_softmax": ("weak", 1),
    "ldam_drw": ("weak", 1), "ride": ("weak", 3), "sade": ("weak", 3), "balpoe": ("weak", 3), "ncl": ("strong", 3),
}  # fmt: skip


def sample(*overrides):
    return parse(SAMPLE, Config, overrides)


def files(*overrides):
    return parse(FILES, Config, overrides)


def problem_of(path, text):
    """What is wrong with a file of that text: one line."""
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(path, Config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- what the method decides ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_a_method_by_its_name_alone_has_its_views_and_experts(name):
    config = sample(f"method={name}")
    assert config.method.name == name
    assert (config.views, config.experts) == METHODS[name]
    assert config == sample(f"method={{name: {name}}}")


@pytest.mark.parametrize(
    ("method", "experts"),
    [
        ("{name: mdcs, lambdas: [1, 1]}", 2),
        ("{name: dl, lambdas: [-0.5, 0.5, 1.5, 2.5]}", 4),
        ("{name: balanced_softmax, experts: 3}", 3),
        ("{name: ride, experts: 4}", 4),
        ("{name: balpoe, taus: [1.0]}", 1),
        ("{name: ncl, networks: 2}", 2),
    ],
)
def test_the_number_of_experts_is_that_of_the_methods_own_list_or_number(method, experts):
    assert sample(f"method={method}").experts == experts
    assert sample(f"method={method}", f"model.experts={experts}").experts == experts


@pytest.mark.parametrize("name", [name for name in METHODS if name != "mdcs"])
def test_every_method_but_mdcs_can_see_either_view_or_both(name):
    for views in ("weak", "strong", "both"):
        assert sample(f"method={{name: {name}, views: {views}}}").views == views


def test_the_method_of_the_paper_is_the_default_with_its_numbers():
    method = files().method
    assert (method.name, method.lambdas) == ("mdcs", (-0.5, 1.0, 2.5))
    assert (method.alpha, method.ramp_epochs, method.temperature, method.confident) == (0.6, 20, 1.0, "adjusted")


@pytest.mark.parametrize("name", ["ldam_drw", "ride"])
def test_weights_are_deferred_to_the_first_milestone_unless_the_method_says_an_epoch(name):
    assert sample(f"method={name}").deferred_epoch == 2
    assert sample(f"method={{name: {name}, deferred_epoch: 0}}").deferred_epoch == 0
    assert sample(f"method={{name: {name}, deferred_epoch: 9}}", "schedule=cosine").deferred_epoch == 9
    assert sample(f"method={name}", "schedule=cosine", "epochs=180").deferred_epoch == 144  # 80 %, as 160 of 200


def test_the_headline_is_the_last_epoch():
    assert sample().headline == "last_epoch"


@pytest.mark.parametrize("name", METHODS)
def test_a_resolved_configuration_reads_back_equal(name):
    config = sample(f"method={name}")
    assert parse(dump(config), Config) == config


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "line", "words"),
    [
        ("epochs: 4", "epoch: 4\nepochs: 4", 11, "epoch: there is no such key; did you mean 'epochs'?"),
        ("method: mdcs", "method: {name: mdcs, lambda: [1]}", 8, "method.lambda: there is no such key.*lambdas"),
        ("method: mdcs", "method: {name: ce, lambdas: [1]}", 8, "method.lambdas: there is no such key"),
        ("method: mdcs", "method: mcds", 8, "method.name: unknown value 'mcds'; did you mean 'mdcs'"),
        ("name: sample", "name: sampel", 3, "data.name: unknown value 'sampel'; did you mean 'sample'"),
        ("depth: 8", "depth: 31", 7, "model.depth: 31 is not 6 n \\+ 2, as in 8, 14"),
        ("depth: 8", "depth: 2", 7, "model.depth: 2 is below 8"),
        ("augment: grey", "augment: grey\n  imbalance_factor: 0.5", 7, "imbalance_factor: 0.5 is below 1"),
        ("augment: grey", "augment: gray", 6, "data.augment: unknown value 'gray'"),
        ("augment: grey", "augment: photo", 2, "augment 'photo' is not for sample; photo .* are for files"),
        ("std: [0.353]", "std: [0.353, 0.2]", 2, "mean has 1 channels and std 2"),
        ("std: [0.353]", "std: [0]", 5, "data.std.0: 0 must be above 0"),
        ("augment: grey", "augment: grey\n  train_list: a.txt", 2, "sample is not read from lists; remove train_list$"),
        ("augment: grey", "augment: grey\n  num_classes: 4", 2, "sample is not read from lists; remove num_classes$"),
        ("augment: grey", "augment: grey\n  relabel: true", 2, "sample is not read from lists; remove relabel$"),
        ("milestones: [2, 3]", "milestones: [3, 2]", 10, r"schedule.milestones: \[3, 2\] do not rise"),
        ("milestones: [2, 3]", "milestones: [2, 2]", 10, r"schedule.milestones: \[2, 2\] do not rise"),
        ("width: 4", "width: 4, pretrained: a.pth", 7, "pretrained and share_stage3 are for the large networks"),
        ("width: 4", "width: 4, share_stage3: true", 7, "pretrained and share_stage3 are for the large networks"),
        ("std: [0.353]", "std: []", 2, "mean has 1 channels and std 0"),
        ("lr: 0.05", "lr: 0", 9, "optimizer.lr: 0 must be above 0"),
        ("lr: 0.05", "lr: 0.05, momentum: 1", 9, "optimizer.momentum: 1 must be below 1"),
        ("lr: 0.05", "lr: 0.05, momentum: 0", 9, "optimizer: nesterov needs a momentum above 0; set nesterov: false"),
        ("method: mdcs", "method: {name: mdcs, lambdas: []}", 8, "method.lambdas"),
        ("method: mdcs", "method: {name: mdcs, temperature: 0}", 8, "method.temperature: 0 must be above 0"),
        ("method: mdcs", "method: {name: ncl, networks: 1}", 8, "method.networks: 1 is below 2"),
        ("method: mdcs", "method: {name: dl, views: two}", 8, "method.views: unknown value 'two'.*weak, strong, both"),
        ("epochs: 4", "epochs: 0", 11, "epochs: 0 is below 1"),
        ("batch_size: 32\n", "", None, "batch_size: is missing"),
        ("augment: grey", "augment: grey\n  subset_seed: -1", 7, "data.subset_seed: -1 is below 0"),
        # What two sections say together has no line of its own: the keys are named.
        ("width: 4", "width: 4, experts: 2", None, "model.experts is 2, but method mdcs has 3 .*make them equal"),
        ("width: 4", "width: 4, experts: 4", None, r"method mdcs has 3 \(one a lambda\); make them equal"),
        ("method: mdcs", "method: {name: balpoe, taus: [0, 1]}", 8, r"method.taus: \[0.0, 1.0\] has mean 0.5; .*is 1$"),
        ("method: mdcs", "method: {name: balpoe, taus: [1, 1.00001]}", 8, "method.taus: .* has mean 1"),
        ("method: mdcs", "method: {name: balpoe, taus: []}", 8, "method.taus"),
        ("method: mdcs", "method: {name: sade, tau: -1}", 8, "method.tau: -1 is below 0"),
        ("augment: grey", "augment: grey\n  workers: -1", 7, "data.workers: -1 is below 0"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_with_its_place(tmp_path, old, new, line, words):
    assert old in SAMPLE
    path = tmp_path / "run.yaml"
    found = problem_of(path, SAMPLE.replace(old, new))
    place = f"{path}:{line}: " if line else f"{path}: "
    assert found.startswith(place), found
    assert re.search(words, found), found


@pytest.mark.parametrize(
    ("old", "new", "line", "words"),
    [
        ("  image_root: images\n", "", 2, "a list data set needs image_root as well"),
        ("  train_list: train.txt\n  test_list: test.txt\n", "", 2, "needs train_list, test_list as well"),
        ("  num_classes: 3\n", "", 2, "a list data set needs num_classes as well"),
        ("num_classes: 3", "num_classes: 3\n  imbalance_factor: 10", 2, "as it is listed; remove imbalance_factor$"),
        ("num_classes: 3", "num_classes: 3\n  n_max: 10", 2, "taken as it is listed; remove n_max$"),
        ("augment: photo", "augment: cifar", 2, "augment 'cifar' is not for list"),
        ("augment: photo", "augment: grey", 2, "augment 'grey' is not for list"),
    ],
)
def test_a_mistake_about_lists_is_one_line_with_its_place(tmp_path, old, new, line, words):
    assert old in FILES
    path = tmp_path / "run.yaml"
    found = problem_of(path, FILES.replace(old, new))
    assert found.startswith(f"{path}:{line}: " if line else f"{path}: "), found
    assert re.search(words, found), found


@pytest.mark.parametrize("name", ["imagenet_lt", "places_lt", "inaturalist18", "list"])
def test_a_list_data_set_may_be_numbered_anew_and_go_without_augmentation(name):
    assert files(f"data.name={name}", "data.relabel=true").data.listed
    assert files(f"data.name={name}", "data.augment=none").data.augment == "none"


@pytest.mark.parametrize("name", METHODS)
def test_every_method_takes_split_batch_statistics_also_where_it_sees_one_view(name):
    assert sample(f"method={name}", "bn_views=split").bn_views == "split"


def test_the_number_of_experts_that_does_not_fit_speaks_of_lambdas_only_where_the_method_has_some():
    for method, said in (("mdcs", "has 3 (one a lambda)"), ("dl", "has 3 (one a lambda)"), ("sade", "has 3;")):
        with pytest.raises(ConfigError) as caught:
            sample(f"method={method}", "model.experts=2")
        assert f"model.experts is 2, but method {method} {said}" in str(caught.value)


@pytest.mark.parametrize(("data", "tau"), [("imagenet_lt", 2.0), ("places_lt", 1.0), ("inaturalist18", 1.0),
                                           ("list", 2.0)])  # fmt: skip
def test_sades_tau_is_that_of_the_data_set_unless_the_method_has_its_own(data, tau):
    assert files(f"data.name={data}", "method=sade").sade_tau == tau
    for own in (0.0, 1.0, 2.0, 3.5):
        assert files(f"data.name={data}", f"method={{name: sade, tau: {own}}}").sade_tau == own


def test_sades_tau_is_two_on_images_in_memory():
    assert sample("method=sade").sade_tau == 2.0
    assert sample("method={name: sade, tau: 0}").sade_tau == 0.0


@pytest.mark.parametrize("taus", ["[0, 1, 2]", "[1]", "[0.5, 0, 2.5]", "[0.1, 1.9]", "[0.7, 1.1, 1.2]"])
def test_balpoes_taus_of_mean_one_are_taken(taus):
    assert sum(sample(f"method={{name: balpoe, taus: {taus}}}").method.taus) == pytest.approx(taus.count(",") + 1)


def test_images_can_be_decoded_without_threads():
    assert files("data.workers=0").data.workers == 0


def test_several_mistakes_are_told_at_once():
    with pytest.raises(ConfigError) as caught:
        sample("model.depth=31", "epochs=0", "schedule.milestones=[3, 1]")
    assert len(str(caught.value).splitlines()) == 3
