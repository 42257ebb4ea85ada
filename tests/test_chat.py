"""How text becomes tokens: a model reads what its own chat template writes, and text is text."""
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from argparse import Namespace
from datetime import datetime
from pathlib import Path

import jinja2
import pytest
import torch
from conftest import call, free_port, read_jsonl, run
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer,
                          LlamaConfig, Phi3Config, PreTrainedTokenizerFast)

import align
import generate
from toy import write_jsonl

QUESTION = [{"role": "user", "content": "Who wrote Hamlet?"}]
TEXTS = ["Who wrote Hamlet? Shakespeare wrote it.", "A man, I think; it is four.", "Paris is the capital."]

CHATML = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
EMPTY_THOUGHT = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
                 "<think>\n\n</think>\n\n{% endif %}{{ m['content'] }}<|im_end|>\n{% endfor %}"
                 "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
PHI3 = ("{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}")
GEMMA = ("{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}"
         "{{ raise_exception('no system') }}{% endif %}<start_of_turn>"
         "{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
         "{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
         "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}")
ZEPHYR = ("{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
          "{% if add_generation_prompt %}<|assistant|>\n{% endif %}")
VICUNA = ("{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}"
          "USER: {{ m['content'] }} ASSISTANT:{% else %} {{ m['content'] }}{{ eos_token }}"
          "{% endif %}{% endfor %}")
NO_END = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"


def byte_level(template=None, eos="<|endoftext|>", more=()):
    """A tokenizer of bytes, in GPT-2's spelling, and of the control tokens that a template names."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, bos_token="<s>",
                                        pad_token="<pad>", clean_up_tokenization_spaces=False)
    named = re.findall(r"<\|?[^<>\s'\"{}%]{1,40}\|?>|<｜[^<>]*?｜>|\[/?[A-Z_]+\]", template or "")
    control = [token for token in dict.fromkeys([*named, *more]) if not re.fullmatch("</?think>", token)]
    tokenizer.add_special_tokens({"extra_special_tokens": control})
    tokenizer.chat_template = template
    return tokenizer


def llama_2(template=None):
    """A tokenizer of the Llama-2 kind: a text begins with a space, which decoding takes away."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<unk>", "<s>", "</s>", "<pad>"]
    trained = [*special, *[f"<0x{byte:02X}>" for byte in range(256)]]
    tokenizer.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=420, special_tokens=trained))
    backend = json.loads(tokenizer.to_str())
    backend["added_tokens"] = [token for token in backend["added_tokens"] if token["content"] in special]
    tokenizer = Tokenizer.from_str(json.dumps(backend))
    tokenizer.pre_tokenizer = None  # as its tokenizer.json has it
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(),
                                           decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>",
                                        unk_token="<unk>", pad_token="<pad>")
    tokenizer.chat_template = template
    return tokenizer


def small_model(folder, tokenizer, config=LlamaConfig, classifier=False, **changes):
    """A tiny random model in a folder, with its tokenizer."""
    torch.manual_seed(0)
    shape = dict(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                 num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=512,
                 initializer_range=0.1, bos_token_id=tokenizer.bos_token_id, num_labels=1,
                 eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    kind = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
    model = kind.from_config(config(**shape | changes))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model.eval()


def finished(tokenizer, prompt, answer):
    """The text of a finished conversation, by jinja2 itself."""
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    messages = [*prompt, {"role": "assistant", "content": answer}]
    return environment.from_string(tokenizer.chat_template).render(
        messages=messages, bos_token=tokenizer.bos_token, eos_token=tokenizer.eos_token)


def end_of(tokenizer):
    return align.end_token(tokenizer, {tokenizer.eos_token_id})


# ---- the templates -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("template, before, after, end", [
    (CHATML, "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>"),
    (EMPTY_THOUGHT, "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
     "<|im_end|>"),
    (PHI3, "<|user|>\n", "<|end|>\n<|assistant|>\n", "<|end|>"),
    (GEMMA, "<s><start_of_turn>user\n", "<end_of_turn>\n<start_of_turn>model\n", "<end_of_turn>"),
    (VICUNA, "<s>USER: ", " ASSISTANT: ", "<|endoftext|>"),
    (NO_END, "<|user|>", "<|assistant|>", "<|endoftext|>")])
def test_prompt_response_and_end_are_those_of_a_finished_turn(template, before, after, end):
    tokenizer = byte_level(template, more=["<|end|>", "<|user|>", "<|assistant|>"])
    stop = align.end_token(tokenizer, {tokenizer.convert_tokens_to_ids("<|end|>")})
    assert tokenizer.convert_ids_to_tokens(stop) == end
    ids, apart = align.encode(tokenizer, QUESTION, ["He did.", "I"], stop)
    prompt = f"{before}Who wrote Hamlet?{after}"
    assert [tokenizer.decode(part) for part in ids] == [prompt, f"He did.{end}", f"I{end}"]
    assert not apart


LLAMA_CPP = Path(os.environ.get("LLAMA_CPP", "none"))  # vendor/llama.cpp of llama_cpp_python 0.3.36's sdist


def published_templates():
    """Those in trl's wheel, and llama.cpp's."""
    found = importlib.util.find_spec("trl")  # not imported: the wheel's files are enough
    folder = Path(found.origin).parent / "chat_templates" if found else Path("none")
    return sorted(folder.glob("*.jinja")) + sorted(LLAMA_CPP.glob("models/templates/*.jinja"))


@pytest.mark.parametrize("path", published_templates(), ids=lambda path: path.stem)
def test_published_templates(path, process_group):
    """The ids are those of the template's own text up to its end token. A template that loses the answer or
    takes no text is refused."""
    template = path.read_text()
    tokenizer = byte_level(template)
    answer = "Shakespeare wrote it."
    try:
        text = tokenizer.apply_chat_template([*QUESTION, {"role": "assistant", "content": answer}],
                                             tokenize=False)
    except Exception:
        text = ""
    if answer not in text:  # it takes lists of images and texts
        with pytest.raises(Exception):
            align.encode(tokenizer, QUESTION, [answer], tokenizer.eos_token_id)
        return
    stop = end_of(tokenizer)
    (prompt, response), apart = align.encode(tokenizer, QUESTION, [answer], stop)
    before, after = text.split(answer)
    end = tokenizer.convert_ids_to_tokens(stop)
    upto = after.partition(end)[0]  # all, where the template writes no end
    assert tokenizer.decode(prompt + response) == before + answer + upto + end
    assert tokenizer.decode(prompt) == before and not apart
    assert prompt + response[:-1] == tokenizer(before + answer + upto, add_special_tokens=False).input_ids


def test_the_end_is_the_models_own_then_a_control_token_then_eos():
    tokenizer = byte_level(PHI3, more=["<|end|>"])
    end, eos = tokenizer.convert_tokens_to_ids("<|end|>"), tokenizer.eos_token_id
    assert align.end_token(tokenizer, {end, eos}) == end
    assert align.end_token(tokenizer, {eos}) == eos  # it stands behind <|end|> and a newline
    assert align.end_token(tokenizer, set()) == end
    assert align.end_token(byte_level(NO_END), set()) == byte_level(NO_END).eos_token_id
    assert align.end_token(byte_level(), {7}) == byte_level().eos_token_id


def test_a_reward_model_reads_all_that_the_template_writes():
    tokenizer = byte_level(PHI3, more=["<|end|>"])
    (prompt, response), _ = align.encode(tokenizer, QUESTION, ["He."])
    assert tokenizer.decode(prompt + response) == finished(tokenizer, QUESTION, "He.")


def test_a_response_goes_on_in_a_turn_that_the_prompt_began():
    tokenizer = byte_level(CHATML)
    prompt = [*QUESTION, {"role": "assistant", "content": "It was"}]
    ids, apart = align.encode(tokenizer, prompt, [" him.", "n't me."], end_of(tokenizer))
    assert tokenizer.decode(ids[0]).endswith("<|im_start|>assistant\nIt was") and not apart
    assert [tokenizer.decode(part) for part in ids[1:]] == [" him.<|im_end|>", "n't me.<|im_end|>"]
    prompt[-1]["content"] = "It was 4."  # as the probes of encode begin or end
    ids, _ = align.encode(tokenizer, prompt, ["5", "4."], end_of(tokenizer))
    assert tokenizer.decode(ids[0]).endswith("It was 4.")
    assert [tokenizer.decode(part) for part in ids[1:]] == ["5<|im_end|>", "4.<|im_end|>"]


def test_what_a_template_loses_or_refuses_is_an_error():
    system = {"role": "system", "content": "Be brief."}
    drops = byte_level("{% for m in messages if m['role'] != 'system' %}<|{{ m['role'] }}|>{{ m['content'] }}"
                       "{{ eos_token }}{% endfor %}")
    with pytest.raises(AssertionError, match="drops or changes 'Be brief.'"):
        align.encode(drops, [system, *QUESTION], ["He."])
    with pytest.raises(AssertionError, match="drops or changes 'Be brief.'"):
        align.encode(drops, [system, *QUESTION], [])
    with pytest.raises(Exception, match="no system"):
        align.encode(byte_level(GEMMA), [system, *QUESTION], ["He."])
    thinks = byte_level(CHATML.replace("m['content']", "m['content'].split('</think>')[-1]"))
    with pytest.raises(AssertionError, match="drops or changes"):
        align.encode(thinks, QUESTION, ["I guess.</think>He."])
    thought = "<think>\n\n</think>\n\n"
    thinks = byte_level(EMPTY_THOUGHT.replace(
        thought, "{% if '</think>' not in m['content'] %}" + thought + "{% endif %}"))
    with pytest.raises(AssertionError, match="writes another <think> block"):
        align.encode(thinks, QUESTION, ["<think>\nI guess.</think>He."])


def test_an_end_that_is_no_token_is_text_before_eos():
    tokenizer = byte_level(CHATML)
    plain = byte_level()
    plain.chat_template = tokenizer.chat_template
    (_, response), _ = align.encode(plain, QUESTION, ["He."], end_of(plain))
    assert plain.decode(response) == "He.<|im_end|>\n<|endoftext|>"
    assert generate.decode(plain, QUESTION, [], response[:-1]) == "He."


def test_a_template_that_another_way_of_tokenising_changes_is_refused(monkeypatch):
    tokenizer = byte_level(CHATML)
    monkeypatch.setattr(align, "encode", lambda *_: (([1, 2], [3]), False))
    with pytest.raises(AssertionError, match="other tokens"):
        align.end_token(tokenizer, set())


# ---- spaces, borders, control tokens in texts --------------------------------------------------------------

def pieces(tokenizer, ids):
    return [tokenizer.convert_ids_to_tokens(part) for part in ids]


def test_a_response_has_the_tokens_that_it_has_behind_its_prompt():
    """Tokenised alone, a text of the Llama-2 kind would begin with a space, or with two."""
    tokenizer = llama_2()
    ids, apart = align.encode(tokenizer, "Answer:", [" Shakespeare wrote it."], tokenizer.eos_token_id)
    whole = tokenizer("Answer: Shakespeare wrote it.", add_special_tokens=False).input_ids
    assert ids[0] + ids[1] == [tokenizer.bos_token_id] + whole + [tokenizer.eos_token_id] and not apart
    tokenizer.chat_template = ZEPHYR
    ids, apart = align.encode(tokenizer, QUESTION, ["Shakespeare wrote it.", "Paris"], tokenizer.eos_token_id)
    assert not apart and not any(parts[0].startswith("▁") for parts in pieces(tokenizer, ids[1:]))
    text = finished(tokenizer, QUESTION, "Shakespeare wrote it.").rstrip("\n")
    assert ids[0] + ids[1] == tokenizer(text, add_special_tokens=False).input_ids


def test_where_a_token_spans_the_border_both_are_tokenised_apart(tmp_path, process_group, capsys):
    """Here "Q" and "A" make one token. A pair has one prompt: if one response needs it, both are apart."""
    backend = json.loads(byte_level().backend_tokenizer.to_str())
    backend["added_tokens"] = []
    backend["model"]["vocab"]["QA"] = 256
    backend["model"]["merges"] = [["Q", "A"]]
    backend = Tokenizer.from_str(json.dumps(backend))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    ids, apart = align.encode(tokenizer, "aQ", ["Ab", "bc"], tokenizer.eos_token_id)
    assert apart and pieces(tokenizer, ids) == [["a", "Q"], ["A", "b", "</s>"], ["b", "c", "</s>"]]
    ids, apart = align.encode(tokenizer, "aQ", ["bA", "bc"], tokenizer.eos_token_id)
    assert not apart and pieces(tokenizer, ids)[1] == ["b", "A", "</s>"]
    write_jsonl(tmp_path / "pairs.jsonl", [{"prompt": "aQ", "chosen": "b", "rejected": text}
                                           for text in ("Ab", "c", "A")])
    lm = Namespace(config=LlamaConfig(), generation_config=Namespace(eos_token_id=[tokenizer.eos_token_id]))
    align.Rows(str(tmp_path / "pairs.jsonl"), ["chosen", "rejected"], tokenizer, lm, 99)
    assert "2 tokenised apart" in capsys.readouterr().out


@pytest.mark.skipif(not LLAMA_CPP.exists(), reason="LLAMA_CPP is not set")
@pytest.mark.parametrize("name", ["llama-spm", "qwen2"])
def test_real_tokenizers(name):
    """Llama-2's and Qwen2's. Text has the ids that it always had. A response has those that it has in the
    whole conversation, with and without a template, and generate.py reads it back."""
    tokenizer = AutoTokenizer.from_pretrained(LLAMA_CPP / "models", gguf_file=f"ggml-vocab-{name}.gguf")
    end = tokenizer.eos_token_id
    code = "def f(x):\n    return x"
    texts = [*TEXTS, code, "\tTabs,  two spaces", "€ 1,234.50", "東京は日本の首都です。", "n't"]
    for text in texts:
        as_text = tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
        assert as_text == tokenizer(text, add_special_tokens=False).input_ids
        tokenizer.chat_template = ZEPHYR
        (prompt, response), apart = align.encode(tokenizer, QUESTION, [text], end)
        whole = finished(tokenizer, QUESTION, text).rstrip("\n")
        assert prompt + response == tokenizer(whole, add_special_tokens=False).input_ids and not apart
        assert generate.decode(tokenizer, QUESTION, prompt, response[:-1]) == text
        tokenizer.chat_template = None
        (prompt, response), apart = align.encode(tokenizer, "Answer:", [" " + text], end)
        whole = tokenizer("Answer: " + text, add_special_tokens=False).input_ids
        assert (prompt + response)[-len(whole) - 1:] == [*whole, end] and not apart
        assert generate.decode(tokenizer, "Answer:", prompt, response[:-1]) == " " + text


@pytest.mark.parametrize("make", [byte_level, llama_2])
@pytest.mark.parametrize("template", [None, CHATML])
def test_control_tokens_that_a_text_spells_stay_text(make, template):
    tokenizer = make(template)
    if template:
        tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    control = "</s>" if make is llama_2 else "<|endoftext|>"
    text = f"Use {control} or <|im_end|> here."
    prompt = [{"role": "user", "content": text}] if template else text
    ids, _ = align.encode(tokenizer, prompt, [text, " It."], end_of(tokenizer))
    special = [id for id, token in tokenizer.added_tokens_decoder.items() if token.special]
    written = [sum(id in special for id in part) for part in ids]
    assert written[1:] == [1, 1]  # the end
    assert written[0] == (3 if template else 1)  # two starts and an end; or BOS
    assert text in tokenizer.decode(ids[0]) and tokenizer.decode(ids[1][:-1]).strip() == text


def test_a_space_separates_a_response_from_a_text_prompt_and_from_nothing_else():
    tokenizer = byte_level(CHATML)
    read = lambda prompt, text: align.encode(tokenizer, prompt, [text], end_of(tokenizer))[0][1][:-1]
    responses = lambda prompt, text: tokenizer.decode(read(prompt, text))
    code = "    return 1"
    assert responses("Write code.", " " + code) == code  # splits.py has put one space before it
    assert responses("Write code:\n", code) == code  # none behind a blank
    assert responses(QUESTION, code) == code
    tokenizer.chat_template = None
    assert responses("Write code.", " " + code) == " " + code
    assert responses("Write code:\n", code) == code


@pytest.mark.parametrize("prompt", ["<s>[INST] Name a word. [/INST]", "<|im_start|>user\nName a word."])
def test_a_prompt_that_carries_its_template_already_is_refused(prompt):
    with pytest.raises(AssertionError, match="begins with a control token"):
        align.encode(byte_level(CHATML), prompt, ["River."])


@pytest.mark.parametrize("make", [byte_level, llama_2])
@pytest.mark.parametrize("template", [None, ZEPHYR, VICUNA])
def test_prompt_and_generated_response_are_the_text_that_was_sampled(make, template):
    """And read again it has the same tokens."""
    tokenizer = make(template)
    end = end_of(tokenizer)
    texts = ["Shakespeare wrote it.", "    return 1"]
    for prompt in ("Answer:", "Answer:\n", QUESTION):
        for text in texts:
            if not template and not isinstance(prompt, str):
                continue
            response = text if not isinstance(prompt, str) or prompt.endswith("\n") else " " + text
            (before, ids), _ = align.encode(tokenizer, prompt, [response], end)
            assert generate.decode(tokenizer, prompt, before, ids[:-1]) == response


def test_messages_without_a_template_are_turns():
    tokenizer = byte_level()
    prompt = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    ids, _ = align.encode(tokenizer, prompt, ["yes"], tokenizer.eos_token_id)
    assert [tokenizer.decode(part) for part in ids] == [
        "<s>System: be brief\n\nHuman: hi\n\nAssistant:\n", "yes<|endoftext|>"]
    begun = [*prompt, {"role": "assistant", "content": "I say"}]
    (ids,), _ = align.encode(tokenizer, begun, [])
    assert tokenizer.decode(ids).endswith("Human: hi\n\nAssistant: I say")


# ---- the stages --------------------------------------------------------------------------------------------

def test_the_log_probs_are_those_of_the_models_own_text_up_to_its_end(tmp_path):
    """Phi-3 is published with an eos_token that its template does not end a turn with."""
    tokenizer = byte_level(PHI3, more=["<|end|>", "<|user|>", "<|assistant|>"])
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    model = small_model(tmp_path / "base", tokenizer, Phi3Config)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, end]
    model.save_pretrained(tmp_path / "base")
    rows = [{"prompt": QUESTION, "chosen": "He did.", "rejected": "  I do not know"}]
    write_jsonl(tmp_path / "pairs.jsonl", rows)
    run("align.py", "--loss", "dpo", "--model", tmp_path / "base", "--data", tmp_path / "pairs.jsonl",
        "--eval_data", "", "--batch_size", 1, "--max_steps", 1, "--out", tmp_path / "dpo")
    logged = json.loads((tmp_path / "dpo" / "log.jsonl").read_text().splitlines()[0])
    for key in ("chosen", "rejected"):
        text = finished(tokenizer, QUESTION, rows[0][key])
        ids = tokenizer(text, add_special_tokens=False).input_ids[:-2]  # less the newline and eos_token
        length = len(rows[0][key]) + 1
        logps = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        own = sum(logps[i - 1, ids[i]].item() for i in range(len(ids) - length, len(ids)))
        assert ids[-1] == end and logged[f"logps/{key}"] == pytest.approx(own, rel=1e-5)
    saved = json.load(open(tmp_path / "dpo" / "generation_config.json"))
    assert saved["eos_token_id"] == [end, tokenizer.eos_token_id]


@pytest.mark.parametrize("template", [GEMMA, EMPTY_THOUGHT], ids=["gemma", "empty thought"])
def test_a_trained_reward_model_is_as_right_here_as_by_its_own_forward(template, tmp_path):
    """Trained in the usual way, on apply_chat_template of whole conversations."""
    tokenizer = byte_level(template)
    model = small_model(tmp_path / "rm", tokenizer, classifier=True).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    pairs = [{"prompt": [{"role": "user", "content": f"question {n}"}], "chosen": f"yes {n}",
              "rejected": f"no {n}"} for n in range(24)]

    def reward(row, key):
        chat = [*row["prompt"], {"role": "assistant", "content": row[key]}]
        inputs = tokenizer.apply_chat_template(chat, return_tensors="pt", return_dict=True)
        return model(**inputs).logits[0, 0]

    for _ in range(3):
        for row in pairs[:16]:
            loss = -torch.nn.functional.logsigmoid(reward(row, "chosen") - reward(row, "rejected"))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.save_pretrained(tmp_path / "rm")
    write_jsonl(tmp_path / "pairs.jsonl", pairs[16:])
    run("precompute_rewards.py", "--oracle", tmp_path / "rm", "--data", tmp_path / "pairs.jsonl", "--out",
        tmp_path / "rewards.pt")
    saved = torch.load(tmp_path / "rewards.pt", weights_only=True)
    own = torch.tensor([[reward(row, key).item() for row in pairs[16:]] for key in ("chosen", "rejected")])
    saved = torch.cat([saved["chosen"], saved["rejected"]])
    torch.testing.assert_close(saved, own, rtol=0, atol=1e-4)
    assert (own[0] > own[1]).all()


def test_a_reward_model_that_pads_with_its_end_is_read_as_its_classifier_reads(tmp_path):
    tokenizer = byte_level(VICUNA)
    tokenizer.pad_token = tokenizer.eos_token
    model = small_model(tmp_path / "rm", tokenizer, classifier=True)
    row = {"prompt": QUESTION, "chosen": "He.", "rejected": "A man, I think"}
    write_jsonl(tmp_path / "pairs.jsonl", [row])
    run("precompute_rewards.py", "--oracle", tmp_path / "rm", "--data", tmp_path / "pairs.jsonl", "--out",
        tmp_path / "rewards.pt")
    saved = torch.load(tmp_path / "rewards.pt", weights_only=True)
    for key, answer in ("chosen", "He."), ("rejected", "A man, I think"):
        chat = [*QUESTION, {"role": "assistant", "content": answer}]
        inputs = tokenizer.apply_chat_template(chat, return_tensors="pt", return_dict=True)
        assert saved[key].item() == pytest.approx(model(**inputs).logits.item(), abs=1e-4)


def test_a_template_that_writes_the_date_says_so(process_group, capsys):
    template = "{{ strftime_now('%d %b %Y') }}\n" + CHATML
    end_of(byte_level(template))
    assert "writes the day's date" in capsys.readouterr().out
    end_of(byte_level(template.replace("strftime_now('%d %b %Y')", "'26 Jul 2024'")))
    assert not capsys.readouterr().out


def test_on_another_day_rewards_are_said_and_resume_is_refused(tmp_path, monkeypatch, capsys):
    """The template writes the date. The clock that it reads stands still, and is set."""
    def today(day):
        clock = Namespace(now=lambda: datetime(2026, 3, day))
        monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", clock)

    tokenizer = byte_level("{{ strftime_now('%d %b') }}\n" + CHATML)
    small_model(tmp_path / "rm", tokenizer, classifier=True)
    small_model(tmp_path / "base", tokenizer)
    data, rewards, out = (tmp_path / name for name in ("pairs.jsonl", "rewards.pt", "drdo"))
    write_jsonl(data, [{"prompt": QUESTION, "chosen": f"yes {n}", "rejected": f"no {n}"} for n in range(4)])
    flags = ("--model", tmp_path / "base", "--data", data, "--eval_data=", "--oracle_rewards", rewards,
             "--batch_size", 4, "--max_steps", 2, "--save_steps", 1, "--out", out)
    today(8)
    call("precompute_rewards.py", "--oracle", tmp_path / "rm", "--data", data, "--out", rewards)
    (out / "generation_config.json").mkdir(parents=True)  # in the way of the model: the run stops there
    with pytest.raises(OSError):
        call("align.py", *flags)
    assert "in another form" not in capsys.readouterr().out
    (out / "generation_config.json").rmdir()
    today(9)
    with pytest.raises(SystemExit, match="2"):
        call("align.py", *flags, "--resume")
    output, errors = capsys.readouterr()
    assert "an Oracle read its prompts in another form" in output
    assert "the data, their token ids or their rewards have changed" in errors
    today(8)
    call("align.py", *flags, "--resume")
    assert [line["step"] for line in read_jsonl(out / "log.jsonl")] == [1, 2]


def test_phi_3_from_sft_to_a_server(tmp_path):
    """sft.py teaches <|end|>, generate.py stops at it, and so does a server of the folder."""
    tokenizer = byte_level(PHI3, more=["<|end|>", "<|user|>", "<|assistant|>"])
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    model = small_model(tmp_path / "base", tokenizer, Phi3Config)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, end]
    model.save_pretrained(tmp_path / "base")
    question = [{"role": "user", "content": "hi"}]
    write_jsonl(tmp_path / "train.jsonl", [{"prompt": question, "chosen": "yes"}] * 16)
    run("sft.py", "--model", tmp_path / "base", "--data", tmp_path / "train.jsonl", "--eval_data", "",
        "--batch_size", 16, "--max_steps", 40, "--learning_rate", "1e-2", "--out", tmp_path / "sft")
    run("generate.py", "--model", tmp_path / "sft", "--prompts", tmp_path / "train.jsonl", "--temperature", 0,
        "--max_new_tokens", 9, "--out", tmp_path / "answers.jsonl")
    answer, = [json.loads(line) for line in open(tmp_path / "answers.jsonl")]
    assert (answer["response"], answer["tokens"], answer["eos"]) == ("yes", 3, True)
    port = str(free_port())
    serve = [Path(sys.executable).parent / "transformers", "serve", str(tmp_path / "sft"), "--port", port,
             "--device", "cpu"]
    server = subprocess.Popen(serve, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        body = {"model": str(tmp_path / "sft"), "messages": question, "max_tokens": 20, "temperature": 0}
        url = f"http://127.0.0.1:{port}/v1/chat/completions"
        request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
        for _ in range(60):
            try:
                reply = json.load(urllib.request.urlopen(request, timeout=60))
                break
            except urllib.error.URLError:  # not up yet
                assert server.poll() is None
                time.sleep(1)
    finally:
        server.terminate()
        server.wait(30)
    assert reply["choices"][0]["message"]["content"].strip() == "yes"
    assert reply["usage"]["completion_tokens"] <= 4
