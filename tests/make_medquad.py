"""Make the MedQuAD rows of the README's tables out of a checkout of github.com/abachaa/MedQuAD.

    git clone https://github.com/abachaa/MedQuAD
    python tests/make_medquad.py MedQuAD medquad.jsonl.gz

Writes a .jsonl, or .jsonl.gz, file with one column `text`, one article a row, in the format of the
reference's data set: all answers about one subject make its article. Some articles are emptied and
some rows repeated, as they are in that data set. Commit 577bd37 gives 4,512 rows: 4,302 articles,
179 without an answer, 31 exact duplicates; every row is the same and in the same place as in the
file behind the tables.

The data: Ben Abacha and Demner-Fushman, "A Question-Entailment Approach to Question Answering",
BMC Bioinformatics 2019, 20:511, CC BY 4.0. None of it is medical advice.
"""

import argparse
import gzip
import json
import random
import sys
from pathlib import Path
from xml.etree import ElementTree

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import finetune_medical_gpt2 as script  # noqa: E402

# Folder 4 is left out: its short summaries are no articles. 10 to 12 have questions only.
FOLDERS = [
    "1_CancerGov_QA",
    "2_GARD_QA",
    "3_GHR_QA",
    "5_NIDDK_QA",
    "6_NINDS_QA",
    "7_SeniorHealth_QA",
    "8_NHLBI_QA_XML",
    "9_CDC_QA",
]
EMPTY_EVERY = 25  # one article in so many is emptied
REPEAT_FIRST, REPEAT_EVERY = 3, 149  # the first row to be repeated, and the step to the next
ARTICLE_SEED, ROW_SEED = 7, 9  # of the order of the articles, and then of the rows


def read_articles(checkout):
    """A checkout's (title, article) pairs: one for each subject of each folder, in file order."""
    answers = {}  # (folder, title) -> its answers, of all files
    for folder in FOLDERS:
        for path in sorted((checkout / folder).glob("*.xml")):
            document = ElementTree.parse(path).getroot()
            title = document.findtext("Focus")  # "" in three files of 9_CDC_QA: one article
            for element in document.iter("Answer"):
                # A line is a paragraph; the files indent some and leave blank ones between.
                lines = [" ".join(line.split()) for line in (element.text or "").split("\n")]
                answer = "\n".join(line for line in lines if line)
                if answer:
                    answers.setdefault((folder, title), []).append(answer)

    # Files on one subject share answers, word for word: each is kept once.
    return [(title, "\n".join(dict.fromkeys(found))) for (_, title), found in answers.items()]


def make_rows(articles):
    """The rows of (title, article) pairs, shuffled, with the reference's two flaws put in."""
    articles = list(articles)
    random.Random(ARTICLE_SEED).shuffle(articles)
    rows = []
    for number, (title, article) in enumerate(articles, 1):
        # The reference cut the last ten sentences off, which left nothing of a short article.
        answer = "" if number % EMPTY_EVERY == 0 else article
        prompt = script.format_prompt(f"What is {title} and explain in detail?")
        rows.append(f"{prompt} {answer} {script.END_MARK}")

    # Shuffled once more, so that the repeated rows don't stand at the end.
    rows += rows[REPEAT_FIRST::REPEAT_EVERY]
    random.Random(ROW_SEED).shuffle(rows)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkout", type=Path, help="folder of the MedQuAD checkout")
    parser.add_argument("out", type=Path, help="file to write, .jsonl or .jsonl.gz")
    options = parser.parse_args()

    # A part of the checkout would give other rows in another order, and no word about it.
    for folder in FOLDERS:
        if not any((options.checkout / folder).glob("*.xml")):
            parser.exit(2, f"{options.checkout} is no MedQuAD checkout: no XML files in {folder}\n")
    if not options.out.name.endswith((".jsonl", ".jsonl.gz")):
        parser.exit(2, f"{options.out} ends in neither .jsonl nor .jsonl.gz\n")

    rows = make_rows(read_articles(options.checkout))
    lines = [json.dumps({"text": row}, ensure_ascii=False) + "\n" for row in rows]
    content = "".join(lines).encode()
    # With no time in the gzip header, the same checkout gives the same bytes.
    if options.out.suffix == ".gz":
        content = gzip.compress(content, mtime=0)
    options.out.write_bytes(content)
    print(f"{options.out}: {len(rows):,} rows")


if __name__ == "__main__":
    main()
