"""MedQuAD's conversion: that hand-written files give the articles and rows read off them."""

import gzip
import json
import re
import shutil

import make_medquad
import pytest

import finetune_medical_gpt2 as script

FEVER = """<?xml version="1.0" encoding="UTF-8"?>
<Document id="1" source="GARD"><Focus>Fever &amp; chills</Focus><QAPairs>
<QAPair pid="1"><Question qtype="information">What is Fever ?</Question><Answer>Fever is  heat.
    \t
        It&apos;s common.</Answer></QAPair>
<QAPair pid="2"><Question qtype="causes">What causes Fever ?</Question><Answer>   </Answer></QAPair>
<QAPair pid="3"><Question qtype="treatment">How ?</Question><Answer>Rest.\nRest.</Answer></QAPair>
</QAPairs></Document>"""
FEVER_AGAIN = """<Document id="2"><Focus>Fever &amp; chills</Focus><QAPairs>
<QAPair pid="1"><Question>What is Fever ?</Question><Answer>Fever is heat.

It&apos;s common.</Answer></QAPair>
<QAPair pid="2"><Question>Who has Fever ?</Question><Answer>Anyone.</Answer></QAPair>
</QAPairs></Document>"""
COUGH = """<Document id="3"><Focus>Cough</Focus><QAPairs>
<QAPair pid="1"><Question>What is Cough ?</Question><Answer>A reflex.</Answer></QAPair>
</QAPairs></Document>"""
NO_ANSWER = """<Document id="4"><Focus>Silence</Focus><QAPairs>
<QAPair pid="1"><Question>What is Silence ?</Question><Answer/></QAPair>
<QAPair pid="2"><Question>Why ?</Question></QAPair>
</QAPairs></Document>"""


@pytest.fixture
def checkout(tmp_path):
    """A checkout: a subject without an answer in each folder, and one in a folder to leave out."""
    for folder in [*make_medquad.FOLDERS, "4_MPlus_Health_Topics_QA"]:
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "0.xml").write_text(NO_ANSWER)
    (tmp_path / "2_GARD_QA" / "1.xml").write_text(FEVER)
    (tmp_path / "2_GARD_QA" / "2.xml").write_text(COUGH)
    (tmp_path / "2_GARD_QA" / "3.xml").write_text(FEVER_AGAIN)
    (tmp_path / "9_CDC_QA" / "1.xml").write_text(COUGH)
    (tmp_path / "4_MPlus_Health_Topics_QA" / "1.xml").write_text(COUGH)
    return tmp_path


def test_all_answers_about_one_subject_make_one_article(checkout):
    assert make_medquad.read_articles(checkout) == [
        ("Fever & chills", "Fever is heat.\nIt's common.\nRest.\nRest.\nAnyone."),
        ("Cough", "A reflex."),
        ("Cough", "A reflex."),
    ]


def test_every_25th_article_is_emptied_and_every_149th_row_repeated_from_the_4th():
    articles = [(f"illness {i}", f"Article {i}.") for i in range(160)]
    rows = make_medquad.make_rows(articles)
    assert len(rows) == 162 and len(set(rows)) == 160
    order = [int(re.search(r"illness (\d+)", row).group(1)) for row in rows]
    # The split of the README's tables hangs on the order.
    assert order[:8] == [135, 105, 156, 90, 153, 40, 0, 106]
    empty = [row for row in rows if row.endswith(" and explain in detail? [/INST]  </s>")]
    assert len(empty) == 6
    for i in range(160):
        prompt = script.format_prompt(f"What is illness {i} and explain in detail?")
        assert f"{prompt} Article {i}. </s>" in rows or f"{prompt}  </s>" in rows


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_the_command_writes_rows_that_the_script_reads(run_tool, checkout, name):
    out = checkout / name
    assert run_tool(make_medquad, checkout, out) == f"{out}: 3 rows\n"
    content = gzip.decompress(out.read_bytes()) if name.endswith("gz") else out.read_bytes()
    texts = [json.loads(line)["text"] for line in content.decode().splitlines()]
    assert script.read_texts(out) == texts
    assert sorted(text.split(script.ANSWER_MARK)[1] for text in texts) == [
        " A reflex. </s>",
        " A reflex. </s>",
        " Fever is heat.\nIt's common.\nRest.\nRest.\nAnyone. </s>",
    ]
    assert texts[0].startswith("<s> [INST] <<SYS>> You are ")


@pytest.fixture
def expect_refusal(run_tool, capsys, checkout):
    """A function: converting the checkout to `out` must end with 2 and this one line, and write nothing."""

    def expect(out, line):
        with pytest.raises(SystemExit) as stop:
            run_tool(make_medquad, checkout, out)
        assert stop.value.code == 2
        assert capsys.readouterr().err == line
        assert not out.exists()

    return expect


@pytest.mark.parametrize("missing", ["1_CancerGov_QA", "9_CDC_QA"])
def test_a_checkout_without_one_of_its_folders_ends_with_one_line(expect_refusal, checkout, missing):
    shutil.rmtree(checkout / missing)
    line = f"{checkout} is no MedQuAD checkout: no XML files in {missing}\n"
    expect_refusal(checkout / "rows.jsonl", line)


def test_a_file_of_another_kind_is_not_written(expect_refusal, checkout):
    out = checkout / "rows.csv"
    expect_refusal(out, f"{out} ends in neither .jsonl nor .jsonl.gz\n")
