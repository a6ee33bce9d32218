"""Chat templates: the text and the tokens that transformers gives, and what a template cannot do."""

import json

import pytest
from transformers import PreTrainedTokenizerFast

from cuantiza.core.errors import UserError
from cuantiza.core.inputs.tokenizer import load_tokenizer
from cuantiza.core.run.chat import chat

from helpers import copy_tokenizer, edit_config

TURN = "<|im_end|>"
CHATML = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}{{ '<|im_start|>system\nEres útil.<|im_end|>\n' }}"
    "{% endif %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES = {
    "chatml": CHATML,
    "start token": "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content | trim }}{{ eos_token }}{% endfor %}",
    "extensions": """
        {%- for m in messages %}
            {%- if loop.index > 5 %}{% break %}{% endif %}
            {%- generation %}{{ m | tojson }}{% endgeneration %}
        {%- endfor %}
        {{ strftime_now("%Y") }}
    """,
}


@pytest.fixture
def folder(tmp_path):
    """es-mini's tokenizer with two more special tokens."""
    copy_tokenizer(tmp_path, ("tokenizer.json", "tokenizer_config.json"))
    fields = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
    fields["added_tokens"] += [
        {"id": 8192 + n, "content": text, **flags} for n, text in enumerate(("<|im_start|>", TURN))
    ]
    (tmp_path / "tokenizer.json").write_text(json.dumps(fields), encoding="utf-8")
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    del settings["added_tokens_decoder"]  # which transformers would believe
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "vocab_size": 8194}))
    return tmp_path


def put(folder, template):
    path = folder / "tokenizer_config.json"
    path.write_text(
        json.dumps(json.loads(path.read_text(encoding="utf-8")) | {"chat_template": template}), encoding="utf-8"
    )


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("message", ["¿Qué hora es?", "  <b>\n{{ 1 + 1 }} “ñ”  "])
def test_the_tokens_that_transformers_gives(folder, name, message):
    put(folder, TEMPLATES[name])
    messages = [{"role": "user", "content": message}]
    reference = PreTrainedTokenizerFast.from_pretrained(folder)
    expected = reference.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    tokenizer = load_tokenizer(folder)
    assert tokenizer.decode(chat(folder, tokenizer, message).ids, skip_special_tokens=False) == expected
    assert chat(folder, tokenizer, message).ids == reference(expected, add_special_tokens=False)["input_ids"]


def test_the_end_of_a_turn(folder):
    tokenizer = load_tokenizer(folder)
    put(folder, CHATML)
    assert chat(folder, tokenizer, "0123456789").end == {8193}
    put(folder, TEMPLATES["start token"])
    assert chat(folder, tokenizer, "Hola").end == {0}
    put(folder, "{% for m in messages %}{{ m.content }}\n{% endfor %}")
    assert chat(folder, tokenizer, "Hola").end == frozenset()
    put(folder, "{% if messages | length > 1 %}{{ raise_exception('no') }}{% endif %}{{ messages[0].content }}")
    assert chat(folder, tokenizer, "Hola").end == frozenset()


def test_where_a_template_is(folder):
    """A file has priority, and of named templates the default one is taken."""
    tokenizer = load_tokenizer(folder)
    put(folder, [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "sí"}])
    assert tokenizer.decode(chat(folder, tokenizer, "Hola").ids) == "sí"
    (folder / "chat_template.jinja").write_text("archivo", encoding="utf-8")
    assert tokenizer.decode(chat(folder, tokenizer, "Hola").ids) == "archivo"


@pytest.mark.parametrize(
    "template, why",
    [
        (None, r"--chat: .* has no chat template"),
        ([{"name": "tool_use", "template": "no"}], "has no chat template"),
        ("{% if %}", "its chat template fails"),
        ("{{ raise_exception('solo pares') }}", r"its chat template fails \(solo pares\)"),
        ("{{ messages[7].content.x }}", "its chat template fails"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "its chat template fails .*unsafe"),
        ("{{ messages.append(1) }}", "its chat template fails .*unsafe"),
        ("{{ '' }}", "writes nothing"),
    ],
)
def test_what_is_refused(folder, template, why):
    put(folder, template)
    with pytest.raises(UserError, match=why):
        chat(folder, load_tokenizer(folder), "Hola")


def test_generate_answers(make_gpt2, exported, capsys):
    """Only the answer is printed, and it ends before the token that ends a turn."""
    from cuantiza.generate import main

    source = make_gpt2("talks")
    (source / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}<|endoftext|>{% endfor %}")
    edit_config(source, eos_token_id=5, bos_token_id=5)
    artifact = exported(source)
    options = [
        "--artifact",
        str(artifact.path),
        "--prompt",
        "Hola",
        "--greedy",
        "--tokens",
        "3",
        "--no-repeat-ngram",
        "0",
    ]
    assert main([*options, "--chat"]) == 0
    answer = capsys.readouterr()
    assert main(options) == 0
    assert capsys.readouterr().out.startswith("Hola") and not answer.out.startswith("Hola")
    assert "tokens after 2," in answer.err or "tokens after 3," in answer.err
