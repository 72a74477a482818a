"""A checkpoint's own template: rendered in bounds, content kept apart, differences told."""

import time
from pathlib import Path

import pytest

from gemsmith.errors import RequestError, TemplateError
from gemsmith.text import chat
from gemsmith.text.template import CORPUS, ChatTemplate, compare_templates
from gemsmith.text.tokenizer import Tokenizer

USER = [{"role": "user", "content": " Hé "}]
TURNS = """{{ bos_token }}
{%- for message in messages %}
    {{- '<|turn>' + ('model' if message.role == 'assistant' else message.role) + '\n' -}}
    {{- message.content | trim -}}
    {{- '<turn|>\n' -}}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|turn>model\n' -}}
{%- endif %}
"""


def test_a_template_of_the_checkpoint_is_found_and_rendered(tmp_path: Path) -> None:
    assert ChatTemplate.load(tmp_path) is None
    (tmp_path / "chat_template.jinja").write_text(TURNS, encoding="utf-8")
    template = ChatTemplate.load(tmp_path)
    assert template is not None
    text = template.render(USER, add_generation_prompt=True)
    assert text == chat.render(USER, variant="edge", add_generation_prompt=True)


def test_templates_find_what_transformers_gives_them() -> None:
    source = (
        "{% for x in [1, 2] %}{% if x == 2 %}{% break %}{% endif %}{{ tools | tojson }}{% endfor %}"
    )
    assert ChatTemplate(source).render(USER, [{"é": "<b>"}]) == '[{"é": "<b>"}]'


@pytest.mark.parametrize("marker", ["<turn|>", "<eos>", '<|"|>', "<|image|>"])
def test_content_writes_no_special_token_through_a_template(small: Tokenizer, marker: str) -> None:
    template = ChatTemplate(TURNS)
    ids = template.encode([{"role": "user", "content": f"a{marker}b"}], None, small)
    assert small.decode(ids) == f"<bos><|turn>user\na{marker}b<turn|>\n"
    assert ids.count(small.special.turn_close or -1) == 1
    plain = [{"role": "user", "content": "a b"}]
    assert template.encode(plain, None, small) == small.encode(template.render(plain))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% if %}", "failed: line 1: Expected an expression"),
        ("{{ raise_exception('roles must alternate') }}", "failed: .*roles must alternate"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError: access to attribute '__class__'"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{% for i in range(10**9) %}{% endfor %}", "Range too big"),
        ("{% for i in range(9999) %}{{ 'x' * 99999 }}{% endfor %}", "wrote more than 16777216"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "it calls itself without end"),
    ],
)
def test_a_template_that_fails_or_oversteps_is_told(source: str, message: str) -> None:
    with pytest.raises(TemplateError, match=rf"chat_template.jinja failed: .*|{message}") as caught:
        ChatTemplate(source).render(USER)
    assert caught.match(message)
    assert caught.match("remove the template to use the built-in format")


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ (messages | length) ** 9999999999 }}",
    ],
)
def test_a_template_without_end_is_stopped_and_the_next_rendering_works(source: str) -> None:
    template = ChatTemplate(
        "{% if messages | length > 1 %}" + source + "{% endif %}ok", deadline_s=2
    )
    begun = time.monotonic()
    with pytest.raises(TemplateError, match=r"it ran longer than 2 s|MiB of memory"):
        template.render(USER * 2)
    assert time.monotonic() - begun < 30
    template.deadline_s = 60
    assert template.render(USER) == "ok"


def test_a_template_that_eats_memory_is_stopped() -> None:
    doubling = "{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}"
    source = "{% set n = namespace(s='a') %}" + doubling
    with pytest.raises(TemplateError, match=r"MiB of memory|it ran longer|its process ended"):
        ChatTemplate(source, deadline_s=4).render(USER)


def test_a_template_that_is_too_long_or_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TemplateError, match="longer than 1048576 bytes"):
        ChatTemplate("x" * (2**20 + 1))
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(TemplateError, match="cannot be read"):
        ChatTemplate.load(tmp_path)


def test_messages_that_are_no_json_are_refused() -> None:
    with pytest.raises(RequestError, match="must be plain JSON values for a template"):
        ChatTemplate(TURNS).render([{"role": "user", "content": object()}])


@pytest.fixture(scope="module")
def differences() -> dict[str, str]:
    found = compare_templates(ChatTemplate(TURNS), variant="edge")
    return {difference.name: difference.theirs for difference in found}


def test_differences_name_the_conversations_that_differ(differences: dict[str, str]) -> None:
    assert "tool declared" in differences
    assert "thought inside an answer" in differences
    for same in ("one question", "text is trimmed", "several turns", "system"):
        assert same not in differences


def test_a_template_that_raises_where_we_write_is_a_difference(
    differences: dict[str, str],
) -> None:
    assert differences["tool called"].startswith("error: ") or "None" in differences["tool called"]
    every = compare_templates(ChatTemplate("{{ raise_exception('no') }}"))
    assert {difference.name for difference in every} == CORPUS.keys() - {"arguments as a string"}
    assert all(difference.theirs.startswith("error: ") for difference in every)
