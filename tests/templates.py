"""What the stages make of the chat templates that models are published with: the table in METRICS.md.

    pip install trl==1.16.0                                     # its wheel holds templates
    python tests/templates.py
    pip download --no-deps --no-binary :all: llama_cpp_python==0.3.36 && tar xf llama_cpp_python-0.3.36.tar.gz
    python tests/templates.py --llama_cpp llama_cpp_python-0.3.36      # those of llama.cpp too
    python tests/templates.py --all                             # every template, by the name of its file
    python tests/templates.py --models out/sft                  # a folder or a hub name, its own tokenizer

No tokenizer is fetched. Each template gets one of bytes, with the template's control tokens added. `BOS` and
`EOS` stand for what a template takes from its model's tokenizer. The columns come from align.py's own
`encode`, `render` and `end_token`. The last of them compares the ids of a prompt and a response with the
template's own. Where they differ, or the template fails, the row says so.
"""
import argparse
import ast
import io
import re
import sys
from contextlib import redirect_stdout
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast, logging

import align

# model: its template, which is a file of trl or llama.cpp (less .jinja), or a name in llama.cpp's test
MODELS = {
    "Llama-2 (Vigogne-2's copy)": "bofenghuang/vigogne-2-70b-chat",
    "Llama-3": "llama3", "Llama-3.1": "llama3_1", "Llama-3.2": "llama3_2",
    "Llama-3.3": "meta-llama-Llama-3.3-70B-Instruct", "Llama-4": "llama4",
    "Qwen2.5": "qwen2_5", "Qwen3": "qwen3", "Qwen3-2507": "qwen3_instruct_2507",
    "Qwen3.5": "qwen3_5_think", "Qwen3.5, not thinking": "qwen3_5_nothink", "QwQ": "Qwen-QwQ-32B",
    "Phi-3": "phi3", "Phi-3.5": "phi3_5", "Phi-3-medium": "Phi-3-medium", "Phi-4": "phi-4",
    "Gemma, Gemma-2": "gemma", "Gemma-3": "gemma3", "Gemma-4": "gemma4_v5",
    "Mistral-7B-v0.2": "mistralai/Mistral-7B-Instruct-v0.2 (NOTE: Old pre-v1 without a system prompt)",
    "Mistral-Nemo": "mistralai-Mistral-Nemo-Instruct-2407",
    "Mistral-Large-2411": "mistralai/Mistral-Large-Instruct-2411 (mistralai 'v7' template)",
    "Mistral-Small-3.2": "Mistral-Small-3.2-24B-Instruct-2506",
    "Ministral-3, reasoning": "mistralai-Ministral-3-14B-Reasoning-2512",
    "SmolLM3": "HuggingFaceTB-SmolLM3-3B",
    "Granite-3.3": "ibm-granite-granite-3.3-2B-Instruct", "Granite-4.0": "ibm-granite-granite-4.0",
    "DeepSeek-V2": "DeepSeek-V2", "DeepSeek-V3": "deepseekv3", "DeepSeek-V3.1": "deepseek-ai-DeepSeek-V3.1",
    "DeepSeek-R1-Distill": "deepseek_r1_distill",
    "GLM-4.5": "glm4moe", "GLM-4.7-Flash": "GLM-4.7-Flash", "gpt-oss": "gptoss",
}
SYSTEM, QUESTION, ANSWER = "Be brief.", "Who wrote Hamlet?", "Shakespeare did."
CONTROL = re.compile(r"<\|?[^<>\s'\"{}%]{1,40}\|?>|<｜[^<>]*?｜>|\[/?[A-Z_]+\]")
THOUGHT = re.compile(r"</?think>|</?seed:think>|\[/?THINK\]")  # ordinary tokens: a text may hold them


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama_cpp", type=Path, help="the folder of llama_cpp_python's sdist")
    parser.add_argument("--all", action="store_true", help="every template, not those of the list of models")
    parser.add_argument("--models", nargs="+", default=[], help="these models, not the packages")
    args = parser.parse_args()
    logging.set_verbosity_error()
    templates = find_templates(args.llama_cpp)
    tokenizers = {name: make_tokenizer(templates[key]) for name, key in MODELS.items() if key in templates}
    if args.all:
        tokenizers = {name: make_tokenizer(template) for name, template in templates.items()}
    if args.models:
        tokenizers = {name: AutoTokenizer.from_pretrained(name) for name in args.models}
    print("| model | head | end | system message | date | thought |\n|---|---|---|---|---|---|")
    for name, tokenizer in tokenizers.items():
        try:
            cells = describe(tokenizer)
        except Exception as error:  # templates raise what they like
            cells = [f"{type(error).__name__}: {error}"[:100].replace("\n", " ")]
        print("|", " | ".join([name, *cells]), "|")


def find_templates(llama_cpp):
    """{name: template} of the installed trl and transformers, and of llama.cpp's folder."""
    # here: tests/paper.py takes make_tokenizer alone
    from transformers.models.llama4.processing_llama4 import chat_template as llama4
    found = {"llama4": llama4}
    folders = [Path(find_spec("trl").origin).parent / "chat_templates"] if find_spec("trl") else []
    if llama_cpp:
        folders.append(llama_cpp / "vendor/llama.cpp/models/templates")
        source = (llama_cpp / "vendor/llama.cpp/tests/test-chat-template.cpp").read_text()
        field = r'name= \*/ "(.*)",\n(?:\s*//.*\n)*\s*/\* \.template_str= \*/ (?:U8C\()?(".*")\)?,'
        strings = re.findall(field, source)
        found |= {name: ast.literal_eval(template) for name, template in strings}
    for path in [path for folder in folders for path in sorted(folder.glob("*.jinja"))]:
        if not path.stem.endswith("_training"):  # the same text, with marks for TRL's losses
            found[path.stem] = path.read_text()
    return found


def make_tokenizer(template):
    """A tokenizer of bytes with the template's control tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token in sorted(set(CONTROL.findall(template))) if not THOUGHT.fullmatch(token)]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="BOS", eos_token="EOS",
                                   additional_special_tokens=control, chat_template=template)


def describe(tokenizer):
    """Head, end, what becomes of a system message, whether the date is written, and the thought."""
    with redirect_stdout(io.StringIO()) as said:  # end_token says when a template writes the date
        end = align.end_token(tokenizer, set())  # the first control token behind an answer
    (prompt, response), _ = align.encode(tokenizer, QUESTION, [ANSWER], end)
    _, head = tokenizer.decode(prompt).split(QUESTION)
    _, ending = tokenizer.decode(response).split(ANSWER)
    whole = align.render(tokenizer, QUESTION, [ANSWER], tokenize=False)[0]
    written = ending in whole.split(ANSWER)[1]
    user = [{"role": "user", "content": QUESTION}]
    sampled = tokenizer.apply_chat_template(user, tokenize=False, add_generation_prompt=True)
    thought = ["empty"] if THOUGHT.search(head) else []
    tags = THOUGHT.findall(sampled.split(QUESTION)[1])
    if tags and "/" not in tags[-1]:
        thought.append("opened")
    return [code(head), code(ending) + " (not written)" * (not written),
            system_message(tokenizer), "yes" if said.getvalue() else "", ", ".join(thought)]


def system_message(tokenizer):
    """kept, moved into the user's turn, dropped, or refused."""
    user, assistant = {"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}
    try:
        (prompt, _), _ = align.encode(tokenizer, [{"role": "system", "content": SYSTEM}, user], [ANSWER])
    except AssertionError:
        return "dropped"
    except Exception:
        return "refused"
    second = align.render(tokenizer, [user, assistant, user], [ANSWER], tokenize=False)[0]
    opening = second.split(ANSWER)[1].split(QUESTION)[0]  # of a user's turn
    opening = re.findall(rf"{CONTROL.pattern}|[^\s<>]+", opening.replace("EOS", " ").replace("BOS", " "))[-1]
    between = tokenizer.decode(prompt).split(SYSTEM)[1].split(QUESTION)[0]
    return "kept" if opening in between else "moved"


def code(text):
    return "`" + text.replace("\n", "\\n").replace("|", "\\|") + "`"


if __name__ == "__main__":
    main()
