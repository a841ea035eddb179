"""Language models as summarizers: loss and gradients against Transformers' own, prompts, what is refused."""

import copy

import pytest
import torch
from accelerate import Accelerator
from transformers import AutoConfig, AutoModelForCausalLM, BertConfig, BertLMHeadModel, LlamaConfig, LlamaForCausalLM

from retrieve_and_summarize import HopArguments
from utils.data.examples import Document, Example
from utils.errors import UsageError
from utils.files import write_json
from utils.models.decoder_only import LanguageModel
from utils.models.generation import DEFAULTS
from utils.models.sources import DEFAULT_PROMPT, Rows, Sources, collate, decode, render_prompt
from utils.models.summarizer import load_model_and_tokenizer, save_pretrained, set_up, sources_for, wrap
from utils.models.tokenizer import train_tokenizer
from utils.retrieval.teacher import passage_likelihoods

VOCABULARY = 90
SMALL = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3,
         "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128,
         "pad_token_id": 1, "eos_token_id": 2, "bos_token_id": 0, "initializer_range": 0.3}  # fmt: skip
WINDOWS = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
KINDS = {
    "llama": {},
    "qwen3": {},
    "gemma2": WINDOWS,  # logits are capped
    "gemma3_text": WINDOWS,
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "phi": {},  # its output layer has a bias
    "mamba": {"state_size": 4},  # padded: its states would run on from one sequence into the next
}


def build(kind: str):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SMALL, **KINDS[kind]})
    return AutoModelForCausalLM.from_config(config).eval()


def batch_of(prompts, targets):
    """A batch of random tokens: prompts and targets of these lengths."""
    generator = torch.Generator().manual_seed(3)
    rows = [[torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]
            for lengths in (prompts, targets)]  # fmt: skip
    return rows, collate([[row] for row in rows[0]], rows[1], pad_token_id=1)


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_those_of_transformers_one_example_at_a_time(kind):
    plain = build(kind)
    summarizer = LanguageModel(copy.deepcopy(plain))
    (prompts, targets), batch = batch_of((9, 17, 5), (3, 1, 6))
    expected = 0
    for prompt, target in zip(prompts, targets, strict=True):
        labels = torch.tensor([[-100] * len(prompt) + target])
        expected = expected + plain(input_ids=torch.tensor([prompt + target]), labels=labels).loss * len(target)
    expected.backward()
    gradients = {name: parameter.grad for name, parameter in plain.named_parameters()}

    assert summarizer.is_packed == (kind != "mamba")
    for is_packed in {summarizer.is_packed, False}:
        summarizer.is_packed = is_packed
        summarizer.zero_grad()
        loss, nll = summarizer(**batch, label_smoothing_factor=0.0)
        loss.backward()
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
        torch.testing.assert_close(nll, expected.detach(), rtol=1e-5, atol=0)
        for name, parameter in summarizer.model.named_parameters():
            assert (parameter.grad - gradients[name]).norm() <= 1e-5 * max(1, gradients[name].norm()), name
        smoothed, _ = summarizer(**batch, label_smoothing_factor=0.1)
        logits = summarizer(**batch)
        flat = torch.tensor([token for target in targets for token in target])
        theirs = torch.nn.functional.cross_entropy(logits, flat, label_smoothing=0.1, reduction="sum")
        torch.testing.assert_close(smoothed, theirs, rtol=1e-5, atol=0)


@pytest.mark.parametrize("is_packed", [True, False])
def test_a_dummy_batch_and_an_example_without_a_target_add_nothing(is_packed):
    summarizer = LanguageModel(build("llama"))
    summarizer.is_packed = is_packed
    _, batch = batch_of((9, 17), (3, 4))
    alone = {**batch, **{name: batch[name][:1] for name in ("input_ids", "attention_mask", "labels")}}
    whole = summarizer(**alone, label_smoothing_factor=0.1)[0]
    batch["labels"][1] = -100
    torch.testing.assert_close(summarizer(**batch, label_smoothing_factor=0.1)[0], whole)
    batch["labels"][:] = -100
    loss, _ = summarizer(**batch, label_smoothing_factor=0.1)
    loss.backward()
    assert loss == 0
    assert all(p.grad is None or not p.grad.any() for p in summarizer.parameters())


def test_gradient_checkpointing_changes_no_gradient():
    model, gradients = build("llama"), []
    _, batch = batch_of((9, 17, 5), (3, 1, 6))
    for checkpointing in (False, True):
        summarizer = LanguageModel(copy.deepcopy(model), gradient_checkpointing=checkpointing).train()
        summarizer(**batch, label_smoothing_factor=0.1)[0].backward()
        gradients.append([parameter.grad for parameter in summarizer.parameters()])
    assert all(map(torch.equal, *gradients))


# ---- what is read


@pytest.fixture(scope="module")
def tokenizer():
    texts = [DEFAULT_PROMPT, "Anna sold the old mill. Ben saw the green bridge. Who sold it? Anna did.", "user"] * 9
    return train_tokenizer(texts, vocab_size=400)


CHAT = ("{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] | trim }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<s>assistant\n{% endif %}")  # fmt: skip
PASSAGES = ("Anna sold the old mill.", "Ben saw the green bridge.", "Anna did.")


@pytest.mark.parametrize("chat", [None, CHAT], ids=["plain", "chat"])
def test_a_prompt_has_query_and_passages_and_a_target_its_end(tokenizer, chat):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = chat
    document = Document("d", PASSAGES)
    sources = Sources(tokenizer, "concat", 128, "document", prompt_template=DEFAULT_PROMPT)
    before, after = ("<s>user\n", "</s><s>assistant\n") if chat else ("<s>", "\n\n")
    for query in ("Who sold it?", ""):
        (ids,), read = sources.build(query, document, [2, 0])
        assert read == [0, 2]
        text = "Anna sold the old mill.\nAnna did.\n\nWrite a summary of the text above in one paragraph."
        if query:
            text = f"Question: {query}\n\n{text}\nThe summary answers this question: {query}"
        written = tokenizer.decode(ids).replace(" ", "")
        assert written == f"{before}{text}{after}".replace(" ", "")
        assert len(ids) == sources.length(len(sources.tokenize_queries([query])[0]), document, [2, 0])

    example = Example("e", "Who sold it?", document, ["Anna did."], None, None, None)
    rows = Rows([example], [[(2, 0)]], sources, 128)
    assert rows[0]["targets"] == [[*sources.tokenize(["Anna did."])[0], tokenizer.eos_token_id]]
    assert Rows([example], [[(2, 0)]], sources, 2)[0]["targets"][0][1:] == [tokenizer.eos_token_id]
    other = Sources(tokenizer, "concat", 128, "document", prompt_template="{passages}\n{query}")
    assert sources.rules() != other.rules()


def test_a_source_keeps_its_limit_and_its_prompt_whole(tokenizer):
    document = Document("d", PASSAGES * 9)
    for limit in (90, 120):
        sources = Sources(tokenizer, "concat", limit, "rank", prompt_template=DEFAULT_PROMPT)
        for query in ("Who sold it?", "Who sold it? " * 50, ""):
            (ids,), read = sources.build(query, document, range(27))
            assert len(ids) <= limit and 0 < len(read) < 27
            end = "question:" if query else "paragraph."
            assert end in tokenizer.decode(ids)
            size = len(sources.tokenize_queries([query])[0])
            assert sources.length(size, document, range(27)) == len(ids)
    with pytest.raises(UsageError, match=r"--prompt_template takes \d+ of --max_source_length 32 tokens"):
        Sources(tokenizer, "concat", 32, "rank", prompt_template=DEFAULT_PROMPT)


def test_a_prompt_file_needs_its_marks(tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_text("{passages}\nQ: {query}\n")
    assert arguments(path).prompt_template == "{passages}\nQ: {query}"
    for text in ("{passages} only", "{query}\n{passages} {passages}", "{query}: {passages}", "{query}"):
        path.write_text(text)
        with pytest.raises(UsageError, match=r"must have \{passages\} once, and \{query\} in other lines"):
            arguments(path)
    with pytest.raises(UsageError, match=r"none\.txt: cannot be read"):
        arguments(tmp_path / "none.txt")


def arguments(path):
    return HopArguments(prompt_template=str(path))


# ---- models from elsewhere


def save_tiny(folder, tokenizer, **changes):
    """A folder with a tiny Llama and a tokenizer, as from the Hub."""
    torch.manual_seed(0)
    config = LlamaConfig(**{**SMALL, "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id,
                            "pad_token_id": None, **changes})  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def settings(**changes):
    return {**dict.fromkeys(DEFAULTS), "source_lang": None, "target_lang": None, "source_prefix": None,
            "prompt_template": None, "fusion": "concat", "passage_order": "rank", "max_source_length": 64,
            "max_target_length": 16, "max_new_tokens": 16, **changes}  # fmt: skip


def test_a_model_is_loaded_used_and_saved_for_plain_transformers(tokenizer, tmp_path):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token = None  # as GPT-2's and Llama's
    model, tokenizer = load_model_and_tokenizer(save_tiny(tmp_path / "base", tokenizer))
    set_up(model, tokenizer, settings(num_beams=2, max_new_tokens=6))
    summarizer = wrap(model).eval()
    sources = sources_for(summarizer, tokenizer, settings(max_source_length=96))
    built = [sources.build("Who sold it?", Document("d", PASSAGES), read)[0] for read in ([0], [0, 1, 2])]
    batch = collate(built, [[]] * 2, tokenizer.pad_token_id)
    del batch["labels"]
    ids = summarizer.generate(**batch)
    save_pretrained(summarizer, tokenizer, tmp_path / "saved", summarizer.state_dict())

    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    for source, row in zip(built, ids, strict=True):
        whole = plain.generate(torch.tensor(source), attention_mask=torch.ones(1, len(source[0])))
        assert decode(tokenizer, whole[:, len(source[0]) :]) == decode(tokenizer, row[None])
    assert plain.generation_config.max_new_tokens == 6


def test_what_a_language_model_cannot_do_is_refused(tokenizer, tmp_path):
    model, tokenizer = load_model_and_tokenizer(save_tiny(tmp_path, tokenizer))
    for changes, message in (
        ({"fusion": "fid"}, "--fusion fid needs an encoder-decoder, and .* is decoder-only: use --fusion concat"),
        ({"source_prefix": "summarize: "}, "--source_prefix: .* reads a prompt; use --prompt_template"),
        ({"target_lang": "de"}, "the tokenizer of .* has no languages"),
        ({"max_source_length": 113}, "--max_source_length 113 and a summary of 16 tokens: .* 128 tokens in all"),
        ({"max_source_length": 99, "max_new_tokens": 30}, "99 and a summary of 30 tokens: .* 128 tokens in all"),
    ):
        with pytest.raises(UsageError, match=message):
            set_up(model, tokenizer, settings(**changes))
    set_up(model, tokenizer, settings(max_source_length=112))

    tokenizer.eos_token = None
    with pytest.raises(UsageError, match="needs a pad token and an end token"):
        load_model_and_tokenizer(save_tiny(tmp_path / "endless", tokenizer))


def test_a_model_whose_tokens_see_later_ones_is_refused():
    config = BertConfig(vocab_size=60, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                        intermediate_size=16, initializer_range=0.3)  # fmt: skip
    with pytest.raises(
        UsageError, match=r"models of type bert are not supported; .* a token sees those that follow it"
    ):
        wrap(BertLMHeadModel(config))


@pytest.mark.parametrize("kind", ["rwkv", "recurrent_gemma"])
def test_a_model_that_reads_the_padding_of_a_batch_is_refused(kind):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, vocab_size=60, hidden_size=32, num_hidden_layers=3, intermediate_size=32,
                                  num_attention_heads=4, attention_hidden_size=32, lru_width=32)  # fmt: skip
    with pytest.raises(UsageError, match="it reads the padding of a batch"):
        wrap(AutoModelForCausalLM.from_config(config))


def test_a_prompt_is_the_same_on_another_day_and_a_template_that_fails_is_refused(tokenizer):
    dated = copy.deepcopy(tokenizer)
    dated.chat_template = "{{ strftime_now('%d %B %Y') }}" + CHAT
    assert "1 January 2025" in "".join(render_prompt(dated, DEFAULT_PROMPT, True))
    dated.chat_template = "{{ raise_exception('no system turn') }}"
    with pytest.raises(UsageError, match=r"its chat template cannot be used, remove it .*: no system turn"):
        render_prompt(dated, DEFAULT_PROMPT, True)


def test_references_are_cut_and_counted_without_the_tokenizers_start_token(tokenizer):
    sources = Sources(tokenizer, "concat", 128, "rank", prompt_template=DEFAULT_PROMPT)
    texts = ["Anna sold the old mill.", "Anna did.", "Ben saw the green bridge. " * 4]
    whole = [len(ids) + 1 for ids in sources.tokenize(texts)]  # with the end
    assert [len(ids) for ids in sources.tokenize_targets(texts, 6)] == [min(n, 6) for n in whole]
    assert sources.references[0].tolist() == whole


def test_a_chat_models_own_end_tokens_stay_and_the_tokenizers_is_one_of_them(tokenizer, tmp_path):
    folder = save_tiny(tmp_path, tokenizer, eos_token_id=[9, 11])
    model, _ = load_model_and_tokenizer(folder)
    assert model.generation_config.eos_token_id == [9, 11, tokenizer.eos_token_id]


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "gpt2", "mamba"])
def test_a_teacher_may_be_a_language_model(kind, tokenizer, tmp_path):
    torch.manual_seed(0)
    config = {**SMALL, **KINDS[kind], "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **config)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    folder = str(tmp_path)
    write_json(
        tmp_path / "settings.json",
        {
            "model_name_or_path": None,
            "max_source_length": 100,
            "max_target_length": 28,
            "prompt_template": "{query}\n{passages}",
        },
    )
    document = Document("d", PASSAGES)
    examples = [Example("a", "Who sold it?", document, ["Anna did.", "Anna sold the mill."], *[None] * 3),
                Example("b", "", document, ["Ben."], *[None] * 3)]  # fmt: skip
    candidates = [[0, 1, [0, 2]], [2]]
    found = passage_likelihoods(folder, examples, candidates, Accelerator(cpu=True), batch_size=2)
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    sources = Sources(tokenizer, "concat", 100, "rank", prompt_template="{query}\n{passages}")
    for example, passages, likelihoods in zip(examples, candidates, found, strict=True):
        for passage, likelihood in zip(passages, likelihoods, strict=True):
            numbers = passage if isinstance(passage, list) else [passage]
            (prompt,), _ = sources.build(example.query, document, numbers)
            losses = []
            for target in sources.tokenize_targets(example.summaries, 28):
                labels = torch.tensor([[-100] * len(prompt) + target])
                with torch.no_grad():
                    losses.append(plain(input_ids=torch.tensor([prompt + target]), labels=labels).loss.item())
            assert likelihood == pytest.approx(-sum(losses) / len(losses), rel=1e-4)
