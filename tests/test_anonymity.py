"""What is published names no folder of this machine, and names stay text in the model card."""

import json
import re

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from equipoise import TrainConfig, load_data, train
from equipoise.anonymity import without_paths
from equipoise.markdown import code, plain
from equipoise.run import Run
from equipoise.sharing import _as_json, model_card
from equipoise.text import visible

SECRETS = ["ada", "Lovelace", "s3cret", "kunden", "übung", "geheim"]
FOLDER = st.lists(st.sampled_from(SECRETS), min_size=1, max_size=5)
WITH_BLANKS = st.lists(
    st.sampled_from([*SECRETS, "my s3cret", "ada, geheim", "kunden (ada)"]), min_size=1, max_size=4
)
ROOTS = {
    "absolute": "/{0}/{1}",
    "double": "//{0}/{1}",
    "home": "~/{0}/{1}",
    "user": "~ada/{0}/{1}",
    "upwards": "../{0}/{1}",
    "through": "{0}/../{1}",
    "far upwards": "../../../{0}/{1}",
    "here": "./{0}/{1}",
    "address": "file:///{0}/{1}",
    "short address": "file:/{0}/{1}",
    "address of a host": "file://ada/{0}/{1}",
    "drive": "C:\\{2}\\{1}",
    "other drive": "d:/{0}/{1}",
    "share": "\\\\ada\\{2}\\{1}",
    "root of windows": "\\{2}\\{1}",
    "upwards in windows": "..\\{2}\\{1}",
    "variable": "/proc/self/{0}/{1}",
}
SENTENCES = [
    "{}",
    "--out={}",
    "--set x={}",
    "key={}",
    "cannot read {}: it is empty",
    "cannot read '{}'; make it anew",
    'left out "{}" and others',
    "({})",
    "[{}]",
    "see {}, line 3",
    "`{}`",
    "path:{}",
    "a,{}",
    "{}\nand more",
    "x <{}>",
    "@{}",
]


def leaks(text):
    return [secret for secret in SECRETS if secret in text]


@settings(max_examples=400)
@given(st.sampled_from(list(ROOTS)), FOLDER, st.sampled_from(SENTENCES), st.booleans())
def test_paths_are_cut_wherever_they_stand(root, folder, sentence, has_slash):
    path = ROOTS[root].format("/".join(folder), "photo.npy", "\\".join(folder))
    if has_slash:
        path += "\\" if "\\" in root else "/"
    text = without_paths(sentence.format(path))
    assert not leaks(text), text
    assert "photo.npy" in text
    assert without_paths(text) == text


@settings(max_examples=300)
@given(
    st.sampled_from([root for root in ROOTS if root != "through"]),
    WITH_BLANKS,
    st.sampled_from(["{}", "--out={}", "cannot read '{}'; make it anew", "see {} there"]),
)
def test_folders_with_blanks_and_commas_are_cut(root, folder, sentence):
    path = ROOTS[root].format("/".join(folder), "photo.npy", "\\".join(folder))
    assert not leaks(without_paths(sentence.format(path)))


@given(FOLDER, st.sampled_from([":", ";", ",", " ", ", "]))
def test_lists_of_paths_are_cut(folder, separator):
    path = "/" + "/".join(folder)
    text = separator.join([path + "/a.npy"] * 3)
    assert not leaks(without_paths(text))
    assert not leaks(without_paths(text.replace("/", "\\")))
    assert without_paths([path + "/a.npy", path + "/b.npy"]) == ["a.npy", "b.npy"]


@given(FOLDER, st.sampled_from(["", "--data=", "--out=", "features=inception=", "hf:./", "hf:/"]))
def test_relative_paths_are_cut_where_files_are_named(folder, option):
    word = option + "/".join([*folder, "a.npy"])
    content = {
        "command": ["equipoise", "train", word],
        "data": {"source": word, "load": {"source": word}},
        "against": word,
    }
    assert not leaks(json.dumps(without_paths(content), ensure_ascii=False))


@pytest.mark.parametrize(
    "text",
    [
        "ada/cats",
        "10,430 examples/s",
        "https://arxiv.org/abs/1909.03765",
        "n/a and 1/2",
        "and/or",
        "hf:ada/cats@v1/x",
        "2.13.0+cpu",
        "a . b .. c ~ d / e",
        "nats per example; 3. Next",
        "likelihood.elbo",
        "~",
        "",
    ],
)
def test_what_is_no_path_is_kept(text):
    assert without_paths(text) == text


@pytest.mark.parametrize(
    "word",
    ["hf:ada/cats", "--data=hf:ada/cats", "mixture=500", "--quiet", "learning_rate=1e-3", "digits"],
)
def test_words_of_commands_that_are_no_paths_are_kept(word):
    assert without_paths({"command": [word]}) == {"command": [word]}


def test_keys_are_cut_and_none_is_lost():
    found = without_paths({"/ada/x.npy": 1, "/geheim/x.npy": 2, "n": [1.5, None, True]})
    assert found == {"x.npy": 1, "x.npy (2)": 2, "n": [1.5, None, True]}


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda parts: st.lists(parts, max_size=3) | st.dictionaries(st.text(), parts, max_size=3),
    max_leaves=10,
)


@given(JSON_VALUES)
def test_any_json_value_stays_one(value):
    found = without_paths(value)
    assert json.loads(_as_json(found)) == found


def test_names_that_are_not_unicode_become_json():
    assert json.loads(_as_json({"name": "a\udcff"})) == {"name": "a\udcff"}


# ---- Markdown


HOSTILE = st.text(
    st.sampled_from(list("`|<>&*_[]()!\\~# \n\t\r\x00\x1b\u202e\u2066\udcff\u00a0aé:/.@{}\"'-=+"))
) | st.sampled_from(
    [
        "<script>alert(1)</script>",
        "`<img src=x onerror=alert(1)>`",
        "``` \n<b>",
        "a | b | c",
        "a\\|b\\",
        "[x](javascript:alert(1))",
        "![x](http://evil.example/pixel.png)",
        "http://evil.example",
        "www.evil.example",
        "&lt;b&gt;",
        "---\nlicense: mit\n---",
        "\n\n# Title",
        "| a |\n|---|",
        "x" * 5000,
        "<!-- ",
        "$x$",
        " ",
        "`",
        "",
    ]
)
MARKDOWN = MarkdownIt("gfm-like", {"linkify": False, "html": True})


def tokens(text):
    found = []
    for token in MARKDOWN.parse(text):
        found.append(token)
        found += token.children or []
    return found


def shown(name):
    """What a reader of the name should see, without blanks, which Markdown may drop."""
    return "".join(visible(name.replace("\n", "\\n").replace("\t", " "), 200).split())


@settings(max_examples=500)
@given(HOSTILE)
@example("a`")
@example("|")
def test_names_in_cards_stay_text(name):
    table = f"| | |\n|---|---|\n| {code(name, in_table=True)} | {plain(name)} |\n| a | b |\n"
    parsed = tokens(f"text {code(name)} and {plain(name)}.\n\n{table}")
    kinds = [token.type for token in parsed]
    allowed = {"text", "code_inline", "text_special", "inline"}
    structure = {"paragraph", "table", "thead", "tbody", "tr", "th", "td"}
    assert {kind.removesuffix("_open").removesuffix("_close") for kind in kinds} <= (
        allowed | structure
    )
    assert kinds.count("td_open") == 4
    assert kinds.count("tr_open") == 3
    codes = [token.content for token in parsed if token.type == "code_inline"]
    if name.strip() and visible(name).strip():
        assert ["".join(content.split()) for content in codes] == [shown(name)] * 2
    paragraph = next(token for token in parsed if token.type == "inline")
    text = "".join(c.content for c in paragraph.children if c.type in ("text", "text_special"))
    assert "".join(text.split()).endswith(f"and{shown(name)}.")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    options = {"latent_dim": 2, "width": 2, "stage_1_epochs": 1, "stage_2_epochs": 1}
    folder = tmp_path_factory.mktemp("card") / "run"
    config = TrainConfig(**options, n_components=2, batch_size=256)
    return train(load_data("digits"), config, folder)


@settings(max_examples=60)
@given(name=HOSTILE)
def test_a_whole_card_stays_what_it_is(run, name):
    with pytest.MonkeyPatch.context() as patch:
        content = run.settings()
        content["data"] |= {"name": name, "source": name, "load": {"source": f"hf:{name}"}}
        content["versions"] |= {"torch": name, "equipoise": name}
        content["created"] = name
        patch.setattr(Run, "settings", lambda _: content)
        card = model_card(run, "ada/digits", name)
    assert card.startswith("---\n")
    header, text = re.match(r"---\n(.*?)\n---\n(.*)", card, re.DOTALL).groups()
    assert isinstance(yaml.safe_load(header), dict)
    kinds = [token.type for token in tokens(text)]
    assert not {"html_inline", "html_block", "image"} & set(kinds)
    assert kinds.count("link_open") == 1, "that of the paper"
    assert kinds.count("tr_open") == 6
    assert kinds.count("heading_open") == 4
    card.encode()
