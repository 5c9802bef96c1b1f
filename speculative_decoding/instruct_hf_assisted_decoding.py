"""Assisted generation in transformers: a large model writes, TinyLlama guesses ahead for it.

    python speculative_decoding/instruct_hf_assisted_decoding.py --target_dir CodeLlama-7b-hf --draft_dir out/code/hf

Both are Hugging Face folders or names with one tokenizer. The large model is loaded in 8 bit where there is a GPU and
bitsandbytes. The prompt is continued twice, with the large model alone and with its assistant.
"""

import importlib.util
import time

import torch

from lit_gpt.cli import one_line_errors, parse


def main(
    target_dir: str,
    draft_dir: str,
    prompt: str = "Write a function in Python that computes the n-th Fibonacci number.\n",
    max_new_tokens: int = 256,
    eight_bit: bool | None = None,
) -> None:
    """Continue a prompt with a large model, alone and assisted by a small one.

    Args:
        target_dir: Folder or name of the large model.
        draft_dir: Folder or name of the small one.
        prompt: What to continue.
        max_new_tokens: Stop after so many tokens.
        eight_bit: Load the large model in 8 bit; default: where there are a GPU and bitsandbytes.
    """
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
    except ImportError as e:
        raise ImportError(f"this needs transformers: pip install transformers ({e})") from e
    cuda = torch.cuda.is_available()
    if eight_bit is None:
        eight_bit = cuda and importlib.util.find_spec("bitsandbytes") is not None
    device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
    tokenizer, draft_tokenizer = (AutoTokenizer.from_pretrained(name) for name in (target_dir, draft_dir))
    if tokenizer.get_vocab() != draft_tokenizer.get_vocab():
        raise ValueError(f"{target_dir} and {draft_dir} have different tokenizers: one cannot guess for the other")
    if eight_bit:
        quantized = dict(quantization_config=BitsAndBytesConfig(load_in_8bit=True), device_map={"": device})
        # What bitsandbytes computes in; of anything else it complains at every layer of every token.
        target = AutoModelForCausalLM.from_pretrained(target_dir, dtype=torch.float16, **quantized)
    else:
        target = AutoModelForCausalLM.from_pretrained(target_dir, dtype=dtype).to(device)
    draft = AutoModelForCausalLM.from_pretrained(draft_dir, dtype=dtype).to(device)

    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(device)
    seconds = {}
    for name, assistant in (("alone", {}), ("assisted", dict(assistant_model=draft))):
        for _ in range(2):  # the first imports and compiles what it meets on the way
            t0 = time.perf_counter()
            out = target.generate(**inputs, **assistant, do_sample=False, max_new_tokens=max_new_tokens)
            if cuda:
                torch.cuda.synchronize()
            seconds[name] = time.perf_counter() - t0
        new = out.size(1) - inputs["input_ids"].size(1)
        print(f"{name}: {new} tokens in {seconds[name]:.2f} s, {new / seconds[name]:.1f} tokens/s")
    print(f"assisted is {seconds['alone'] / seconds['assisted']:.2f} times as fast\n")
    print(tokenizer.decode(out[0], skip_special_tokens=True))


if __name__ == "__main__":
    with one_line_errors():
        parse(main)
