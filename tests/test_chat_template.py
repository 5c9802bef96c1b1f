"""Which tokens of a conversation are trained, for every template and both kinds of tokenizer."""

import itertools
import json
from pathlib import Path

import pytest
from tiny import train_sentencepiece

from lit_gpt.chat_template import TEMPLATES, ChatTemplate, Straddle, check_messages
from lit_gpt.tokenizer import Tokenizer

SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
SPECIAL += ["<|im_start|>", "<|im_end|>"]
CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "  What is 2 + 2?\n"},
    {"role": "assistant", "content": "4.\n\nReally: 4"},
    {"role": "user", "content": "Und jetzt? 你好 </p> ### Assistant"},
    {"role": "assistant", "content": "  (Nothing else)  "},
]
SAID = ["4.\n\nReally: 4", "(Nothing else)"]


def train_tokenizers(folder: Path) -> Path:
    """A byte-level tokenizer.json that cuts text as Llama 3 does and has its special tokens, and ChatML's."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    from lit_gpt.tokenizer import LLAMA3_PATTERN

    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(LLAMA3_PATTERN), "isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, as_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([Path(__file__).read_text()], trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>", "pad_token": "<|end_of_text|>"}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("tokenizers")
    sentencepiece = train_sentencepiece(folder / "sentencepiece" / "tokenizer.model").parent
    return {"sentencepiece": sentencepiece, "tokenizers": train_tokenizers(folder / "tokenizers")}


@pytest.fixture(scope="module", params=[(k, t) for k in ("sentencepiece", "tokenizers") for t in TEMPLATES], ids=str)
def template(request, folders) -> ChatTemplate:
    kind, name = request.param
    return ChatTemplate.named(name, Tokenizer(folders[kind]))


def spans(template: ChatTemplate, messages: list) -> list[list[int]]:
    """The trained ids, in stretches."""
    encoded = template.encode(messages)
    stretches = itertools.groupby(zip(encoded.ids, encoded.trained, strict=True), key=lambda x: x[1])
    return [[i for i, _ in ids] for trained, ids in stretches if trained]


def test_trained_are_the_assistants_words_and_its_end_of_turn_and_nothing_else(template):
    found = spans(template, CONVERSATION)
    assert [template.tokenizer.decode(ids).strip() for ids in found] == SAID
    for ids in found:
        assert ids[-1] == template.eos_id and ids.count(template.eos_id) == 1
    encoded = template.encode(CONVERSATION)
    assert [encoded.ids[end - 1] for end in encoded.ends] == [template.eos_id] * 2 and len(encoded.ends) == 2


def test_a_prompt_is_how_the_conversation_begins(template):
    ids = template.encode(CONVERSATION).ids
    for n in (2, 4):
        prompt = template.prompt(CONVERSATION[:n])
        assert ids[: len(prompt)] == prompt and template.encode(CONVERSATION).trained[len(prompt)]
        assert not template.encode(CONVERSATION).trained[len(prompt) - 1]


def test_special_tokens_that_people_type_are_characters(template):
    typed = "".join([*template.tokenizer.special, "</s>", "<s>", "<|user|>", "[/INST]"])
    messages = [{"role": "user", "content": f"a {typed} b"}, {"role": "assistant", "content": f"c {typed} d"}]
    plain = [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c d"}]
    special = set(template.tokenizer.special.values())
    count = [sum(i in special for i in template.encode(m).ids) for m in (messages, plain)]
    assert count[0] == count[1]
    assert typed in template.tokenizer.decode(spans(template, messages)[0])
    assert sum(i in special for i in template.prompt(messages[:1])) < count[1]


def test_the_end_of_a_turn_is_the_formats_own_where_the_tokenizer_has_it(folders):
    ends = {
        (kind, name): ChatTemplate.named(name, Tokenizer(folder)).end_of_turn
        for kind, folder in folders.items()
        for name in TEMPLATES
    }
    assert ends["tokenizers", "chatml"] == "<|im_end|>" and ends["tokenizers", "llama3"] == "<|eot_id|>"
    assert ends["tokenizers", "zephyr"] == "<|end_of_text|>"
    assert {end for (kind, _), end in ends.items() if kind == "sentencepiece"} == {"</s>"}  # the vocabulary stays


def test_zephyr_is_tinyllama_chats():
    theirs = (
        "{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] + "
        "eos_token }}\n{% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + message['content'] + eos_token }}\n"
        "{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n"
        "{% endif %}\n{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
    )
    from lit_gpt.chat_template import _compile

    messages = [{**m, "content": m["content"].strip()} for m in CONVERSATION]
    for generation, n in ((False, 5), (True, 4)):
        texts = [
            _compile(source, "").render(messages=messages[:n], add_generation_prompt=generation, eos_token="</s>")
            for source in (theirs, TEMPLATES["zephyr"])
        ]
        assert texts[0] == texts[1]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sentencepiece", "tokenizers"])
def test_transformers_gives_the_same_ids(folders, tmp_path, kind):
    from transformers import AutoTokenizer

    from lit_gpt.hf_tokenizer import export_tokenizer

    tokenizer, folder = Tokenizer(folders[kind]), tmp_path
    (folder / "config.json").write_text("{}")
    export_tokenizer(folders[kind], folder, add_bos=True, max_length=512)
    ChatTemplate.named("zephyr", tokenizer).write(folder)
    theirs = AutoTokenizer.from_pretrained(folder)
    for name in TEMPLATES:
        template = ChatTemplate.named(name, tokenizer)
        if name == "zephyr":  # as it was written
            assert theirs.chat_template == template.source and theirs.eos_token_id == template.eos_id
            assert theirs.pad_token_id != template.eos_id
            for file in ("generation_config.json", "config.json"):
                assert json.loads((folder / file).read_text())["eos_token_id"] == template.eos_id
            again = ChatTemplate.of_model(folder, Tokenizer(folder))
            assert again.encode(CONVERSATION) == template.encode(CONVERSATION)
        theirs.chat_template, theirs.eos_token = template.source, template.end_of_turn
        ids = theirs.apply_chat_template(CONVERSATION, tokenize=True, return_dict=False)
        assert ids == template.encode(CONVERSATION).ids
        ids = theirs.apply_chat_template(CONVERSATION[:4], tokenize=True, add_generation_prompt=True, return_dict=False)
        assert ids == template.prompt(CONVERSATION[:4])


def test_marks_of_what_is_generated_are_overlooked(folders):
    marked = TEMPLATES["zephyr"].replace(
        "(message['content'] | trim) + eos_token",
        "'' }}{%- generation %}\n{{ (message['content'] | trim) + eos_token }}{% endgeneration -%}\n{{ ''",
    )
    tokenizer = Tokenizer(folders["sentencepiece"])
    template = ChatTemplate(marked, tokenizer, "</s>")
    assert template.encode(CONVERSATION) == ChatTemplate.named("zephyr", tokenizer).encode(CONVERSATION)


class TestWhatIsRefused:
    @pytest.mark.parametrize(
        "source, message",
        [
            ("{% for m in messages %}{{ m['content'] }}", "is not Jinja"),
            ("{% for m in messages %}{{ m['content'] }}\n{% endfor %}", "no </s> follows"),
            ("{% for m in messages[1:] %}{{ m['content'] + eos_token }}{% endfor %}", "leaves messages out"),
            (
                "{% for m in messages %}{{ m['content'] | upper + eos_token }}{% endfor %}",
                "changes what the messages say",
            ),
            (
                "{% for m in messages %}{{ m['role'] + m['content'] + eos_token }}{% endfor %}"
                "{% if add_generation_prompt %}Assistant{% endif %}",
                "generation prompt is not how",
            ),
        ],
    )
    def test_templates_whose_spans_are_not_certain(self, folders, source, message):
        with pytest.raises(ValueError, match=message):
            ChatTemplate(source, Tokenizer(folders["sentencepiece"]), "</s>")

    def test_code_in_a_template(self, folders):
        source = "{{ ''.__class__.__mro__[1].__subclasses__() }}" + TEMPLATES["zephyr"]
        with pytest.raises(Exception, match="unsafe"):
            ChatTemplate(source, Tokenizer(folders["sentencepiece"]), "</s>")

    def test_a_token_across_the_border(self, folders):
        source = (
            "{% for m in messages %}{{ m['role'] + '#' + m['content'] + eos_token }}{% endfor %}"
            "{% if add_generation_prompt %}assistant#{% endif %}"
        )
        tokenizer = Tokenizer(folders["tokenizers"])
        template = ChatTemplate(source, tokenizer, "<|eot_id|>")
        assert tokenizer.encode("###", bos=False, eos=False) != tokenizer.encode("#", bos=False, eos=False) * 3
        with pytest.raises(Straddle):
            template.encode([{"role": "user", "content": "a"}, {"role": "assistant", "content": "## b"}])

    @pytest.mark.parametrize(
        "roles, message",
        [
            ("", "no messages"),
            ("s", "system message alone"),
            ("au", "take turns"),
            ("uu", "take turns"),
            ("usa", "take turns"),
        ],
    )
    def test_roles(self, roles, message):
        names = {"s": "system", "u": "user", "a": "assistant"}
        with pytest.raises(ValueError, match=message):
            check_messages([{"role": names[r], "content": "x"} for r in roles])

    def test_empty_messages_and_unknown_names(self, folders):
        with pytest.raises(ValueError, match="is empty"):
            check_messages([{"role": "user", "content": " \n"}])
        with pytest.raises(ValueError, match="unknown chat template 'vicuna'. Known: auto, zephyr"):
            ChatTemplate.named("vicuna", Tokenizer(folders["tokenizers"]))
