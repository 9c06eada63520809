import pytest
from pydantic import Field

from lmtrain.config import Config, build, dump, override, parse_yaml, read_yaml
from lmtrain.errors import ConfigError


class Inner(Config):
    lr: float = Field(1e-3, gt=0)
    betas: tuple[float, float] = (0.9, 0.95)


class Root(Config):
    name: str | None = None
    optimizer: Inner = Inner()
    maybe: Inner | None = None


def test_overrides_are_yaml_and_are_applied_in_order():
    tree = override(
        {"optimizer": {"lr": 1}}, ["optimizer.lr=3e-4", "optimizer.betas=[0.8, 0.9]", "name=a=b", "maybe.lr=2"]
    )
    root = build(Root, tree, where="test")
    assert root.optimizer.lr == 3e-4
    assert root.optimizer.betas == (0.8, 0.9)
    assert root.name == "a=b"
    assert root.maybe is not None
    assert root.maybe.lr == 2


def test_the_tree_given_is_left_as_it_was():
    tree = {"optimizer": {"lr": 1}}
    override(tree, ["optimizer.lr=2"])
    assert tree == {"optimizer": {"lr": 1}}


def test_dump_reads_back_equal():
    root = build(Root, {"optimizer": {"lr": 3e-4}, "maybe": {}}, where="test")
    assert build(Root, parse_yaml(dump(root), where="dump"), where="test") == root


def test_models_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        Root().name = "x"


@pytest.mark.parametrize("text", ["3e-4", "3E-4", "1e5", "+1.5e+3", ".5e1"])
def test_exponents_without_a_point_are_numbers(text):
    assert parse_yaml(text, where="t") == float(text)


@pytest.mark.parametrize("text", ["e5", "1e", "a1e5", "0x1e5z"])
def test_what_only_looks_like_an_exponent_is_a_string(text):
    assert parse_yaml(text, where="t") == text


def test_only_true_and_false_are_booleans():
    assert parse_yaml("[true, False, on, no, y]", where="t") == [True, False, "on", "no", "y"]


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"optimiser": {}}, "unknown key 'optimiser'; did you mean 'optimizer'"),
        ({"optimizer": {"beta": [0.9, 0.9]}}, "unknown key 'optimizer.beta'; did you mean 'betas'"),
        ({"maybe": {"zzz": 1}}, "unknown key 'maybe.zzz'; known: betas, lr"),
        ({"optimizer": {"lr": "fast"}}, "optimizer.lr = 'fast'"),
        ({"optimizer": {"lr": -1}}, "optimizer.lr = -1"),
        ({"optimizer": {"betas": [0.9]}}, "optimizer.betas"),
        ({"optimizer": 3}, "optimizer = 3"),
    ],
)
def test_bad_trees_give_one_line(tree, message):
    with pytest.raises(ConfigError) as caught:
        build(Root, tree, where="x.yaml")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["a", "=1", "a..b=1", ".a=1"])
def test_bad_overrides(text):
    with pytest.raises(ConfigError, match="not of the form"):
        override({}, [text])


def test_an_override_below_a_value():
    with pytest.raises(ConfigError, match="optimizer is a value, it has no key 'lr'"):
        override({"optimizer": 3}, ["optimizer.lr=1"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\na: 2\n", "the key 'a' is given twice"),
        ("a: [1, 2\n", "line 2: not valid YAML"),
        ("- 1\n", "holds a list"),
        ("a: !!python/object/apply:os.system [true]\n", "not valid YAML"),
    ],
)
def test_bad_files(tmp_path, text, message):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        read_yaml(path)
    assert str(path) in str(caught.value)


def test_missing_file_and_bytes(tmp_path):
    with pytest.raises(ConfigError, match="no config file"):
        read_yaml(tmp_path / "none.yaml")
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_yaml(tmp_path / "b.yaml")
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert read_yaml(tmp_path / "empty.yaml") == {}
