"""Chat templates see and write what they do under transformers' apply_chat_template."""

from __future__ import annotations

from typing import Any

import pytest
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models

from flowprefill.models.chat_template import ChatTemplate

TOKENS = {
    "bos_token": "<a>", "eos_token": "<b>", "pad_token": "<c>", "unk_token": "<d>",
    "sep_token": "<e>", "mask_token": "<f>",
}  # fmt: skip
INNER = tokenizers.Tokenizer(models.BPE({t: i for i, t in enumerate(TOKENS.values())}, []))
THEIRS = transformers.PreTrainedTokenizerFast(tokenizer_object=INNER, **TOKENS)
PARTS = [{"type": "text", "text": "first"}, {"type": "text", "text": " sécond"}]
CHAT: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": 'Say "é" <b>&</b>'},
    {"role": "assistant", "content": None, "refusal": None, "reasoning_content": "thinking\n"},
    {"role": "user", "content": "more", "name": "Zoë"},
]
PARTS_CHAT: list[dict[str, Any]] = [{"role": "user", "content": PARTS}]
LOOP = "{% for m in messages %}"

PLAIN = [
    "{{ pad_token }}{{ unk_token }}{{ sep_token }}{{ mask_token }}{{ cls_token }}{{ eos_token }}",
    LOOP + "[{{ m.content }}|{{ m['content'] }}|{{ m.content is defined }}]{% endfor %}",
    LOOP + "{{ m | tojson(indent=2, ensure_ascii=True, sort_keys=True) }}{% endfor %}",
    LOOP + "{{ m | tojson(true, 1, [',', '=']) }}{% endfor %}",
    "{{ messages | tojson(separators=(',', ':')) }}{{ documents is none }}{{ tools is none }}",
    LOOP + "{{ m.reasoning_content }}/{{ m.thinking }}/{{ m.get('name', 'no') }}{% endfor %}",
    "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}",
    LOOP + "{%- generation -%} {{ loop.index }}{{ m.role }} {%- endgeneration %}\n{% endfor %}",
    "{% set ns = namespace(n=0) %}" + LOOP + "{% set ns.n = ns.n + loop.index %}{% endfor %}"
    "{{ ns.n }}{{ dict(a=1) }}{{ messages[-1].role.title() }}",
    LOOP + "{% if m.role == 'system' %}{% continue %}{% endif %}{{ m.role }}{% endfor %}",
    LOOP + "{% if m.content is string %}{{ m.content | trim }}{% else %}-{% endif %}{% endfor %}",
    "{{ messages[1:] | map(attribute='role') | join(',') }}{{ add_generation_prompt }}",
]
WITH_PARTS = [
    LOOP + "{% for c in m.content %}({{ c.type }}:{{ c.text }}){% endfor %}{% endfor %}",
    LOOP + "{% for c in m['content'] %}{{ c['text'] }},{% endfor %}{% endfor %}",
    LOOP + "{% set it = m.content %}{% for c in it %}{{ c.text }},{% endfor %}{% endfor %}",
    LOOP + "{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for c in m.content %}{{ c.text }}{% endfor %}{% endif %}{% endfor %}",
    LOOP + "{{ m.content | selectattr('type', 'equalto', 'text') | map(attribute='text')"
    " | join('+') }}{% endfor %}",
    LOOP + "{{ m.content[0].text }}{% endfor %}",
    "{% macro show(c) %}{% for p in c %}<{{ p.text }}>{% endfor %}{% endmacro %}"
    + LOOP + "{{ show(m.content) }}{% endfor %}",
    "{{ messages[0] | tojson }}",
    LOOP + "{% for c in m.get('content') %}({{ c.get('text') }}){% endfor %}{% endfor %}",
    LOOP + "{% for c in m.content or [] %}({{ c.text }}){% endfor %}{% endfor %}",
    LOOP + "{% set it = m.content | default([]) %}{% for c in it %}{{ c.text }}.{% endfor %}"
    "{% endfor %}",
    LOOP + "{% with it = m.content %}{% for c in it %}{{ c.text }}.{% endfor %}{% endwith %}"
    "{% endfor %}",
    "{% set ns = namespace(it=none) %}" + LOOP + "{% set ns.it = m.content %}"
    "{% for c in ns.it %}{{ c.text }}.{% endfor %}{% endfor %}",
    LOOP + "{% for c in m.content[1:] %}({{ c['text'] }}){% endfor %}{% endfor %}",
    LOOP + "{{ (m.content | first).text }}{{ (m.content | last)['text'] }}{% endfor %}",
    LOOP + "{{ m.content | join('+', attribute='text') }}{% endfor %}",
    LOOP + "{{ m.content | join('+', 'text') }}{% endfor %}",
]  # fmt: skip


def theirs(text: str, messages: Any, **variables: Any) -> str:
    rendered = THEIRS.apply_chat_template(
        messages, chat_template=text, tokenize=False, add_generation_prompt=True, **variables
    )
    return str(rendered)


@pytest.mark.parametrize("text", PLAIN)
def test_templates_write_what_they_do_under_transformers(text: str) -> None:
    assert ChatTemplate(text, TOKENS).render(CHAT) == theirs(text, CHAT)


@pytest.mark.parametrize("text", WITH_PARTS)
def test_templates_that_go_through_parts_get_them(text: str) -> None:
    assert ChatTemplate(text, TOKENS).render(PARTS_CHAT) == theirs(text, PARTS_CHAT)


@pytest.mark.parametrize("name", ["reasoning_content", "thinking", "reasoning"])
def test_reasoning_has_the_names_that_templates_read(name: str) -> None:
    text = LOOP + "{{ m.reasoning_content }}|{{ m.thinking }}|{{ m.reasoning }}{% endfor %}"
    chat = [{"role": "assistant", "content": "x", name: "why"}]
    assert ChatTemplate(text).render(chat) == theirs(text, chat)


def test_documents_and_variables_reach_the_template() -> None:
    text = "{{ documents | tojson }}{{ effort }}{{ bos_token }}"
    documents = [{"title": "T", "text": "ü"}]
    rendered = ChatTemplate(text, TOKENS).render(CHAT, documents=documents, effort="low")
    assert rendered == theirs(text, CHAT, documents=documents, effort="low")


@settings(max_examples=60, deadline=None)
@given(
    content=st.one_of(st.none(), st.text(max_size=12)),
    template=st.lists(
        st.sampled_from(
            [
                "{{ m.content }}", "{{- m.role -}} ", "{{ m | tojson }}\n", "{% if m.content %}y",
                "{% else %}n", "{% endif %}", "{{ m.content | trim | upper }}", "\n  ", "{# c #}\n",
                "{% set z = loop.last %}{{ z }}", "{{ loop.index0 ~ bos_token }}", "{{ 3.0 / 2 }}",
            ]
        ),
        max_size=6,
    ),
)  # fmt: skip
def test_random_templates_write_the_same(content: str | None, template: list[str]) -> None:
    text = LOOP + "".join(template) + "{% endfor %}"
    chat = [{"role": "assistant", "content": content}, {"role": "user", "content": "ok"}]
    try:
        expected = theirs(text, chat)
    except Exception:  # jinja2 refuses the template: so do we, as test_chat_template shows
        return
    assert ChatTemplate(text, TOKENS).render(chat) == expected


def test_parts_are_joined_for_templates_that_write_content_as_it_is() -> None:
    """Transformers would write Python's list of them."""
    text = LOOP + "{{ m.content | trim }};{{ 'x' + m.content }}{% endfor %}"
    assert ChatTemplate(text).render(PARTS_CHAT) == "first sécond;xfirst sécond"


def test_text_is_a_part_for_templates_that_know_only_parts() -> None:
    """Transformers would have it go through the characters, and lose all of them."""
    text = LOOP + "{% for c in m.content %}[{{ c.text }}]{% endfor %}{% endfor %}"
    chat = [{"role": "user", "content": "whole"}, *PARTS_CHAT]
    assert ChatTemplate(text).render(chat) == "[whole][first][ sécond]"
    lines = LOOP + "{% for c in m.content %}{{ c }}.{% endfor %}{% endfor %}"
    assert ChatTemplate(lines).render(chat[:1]) == "w.h.o.l.e."


def test_another_template_serves_chats_with_tools() -> None:
    template = ChatTemplate("plain", tools_text="{{ tools[0].name }}")
    user = [{"role": "user", "content": "x"}]
    assert template.render(user) == "plain"
    assert template.render(user, tools=[{"name": "look"}]) == "look"
    assert template.with_text("mine").render(user, tools=[{"name": "look"}]) == "mine"
