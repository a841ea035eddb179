"""The embedded data set: meeting transcripts with questions, generated from a seed, without network or files.

A transcript has about 50 turns by a dozen speakers. A one-hop question asks what was agreed about a subject; two or
three turns answer it, and all of them name the subject. A two-hop question asks what the person who looks after a
subject reported: one turn names this person, and only the name leads to the second turn, which the person speaks
without mentioning the subject. Every subject has distractors, turns that share words with a question and answer
nothing. Every speaker reports something, so that the form of a report does not give the answer away.

To see it or to use it as a file: ``python -m utils.data.sample --split validation > sample.jsonl``
"""

import argparse
import itertools
import json
import random
from collections.abc import Iterator

from utils.data.examples import Document, Example
from utils.data.kept import Examples, keep_examples

NAMES = """Abbott Barlow Cassidy Draper Ellison Farrow Granger Holloway Ingram Jarvis Keating Lockwood Mercer Norwood
Osborne Palmer Quimby Radcliff Sawyer Thornton Underhill Vaughn Whitlock Yardley Ashby Beckett Calloway Dalton Eastman
Fletcher Garrison Hadley Irving Jessup Kendrick Langley Maddox Newell Oakley Prescott Ramsey Sheldon Tilden Upton
Vickers Walden Yates Zimmer""".split()
SUBJECT_KINDS = """brick canal coastal copper corner electric forest garden harbor lower market meadow northern orchard
public river school solar southern stone timber upper village winter""".split()
SUBJECTS = """archive bakery bridge choir clinic ferry festival fountain gallery hall kitchen laboratory library mill
museum nursery path pavilion playground shelter stage station tower workshop""".split()
QUALITIES = """ancient blue broken cheap clean crooked dusty empty fresh gentle golden green heavy hidden hollow large
loose narrow orange painted plain polished quiet rusty sharp silver simple slow smooth spare square striped tall thick
tiny warm wet white wide wooden""".split()
THINGS = """anchors baskets bells benches boots bottles boxes brushes buckets cables candles carpets chairs clocks coats
curtains doors drums engines fences flags gates gloves hammers handles kettles ladders lamps maps mirrors nails ovens
pipes plates pumps ribbons ropes shelves shovels signs stoves tables tents tiles trays valves wagons wheels
windows wires""".split()
HAPPENINGS = """arrived burned cracked crumbled disappeared doubled failed faded froze improved jammed leaked melted
moved rattled returned rotted sank shifted split spread stopped swelled vanished""".split()
PLACES = """attic barn basement cellar chapel corridor courtyard depot dock factory garage greenhouse hallway hotel
office park pier porch quarry roof stable street tunnel valley warehouse yard""".split()
MONTHS = "January February March April May June July August September October November December".split()
NUMBERS = """two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen
eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety""".split()
# The wording of a question decides the wording of its reference: it varies, yet a model can learn it.
AGREED = [  # question, then the sentences of the reference for each kind of fact: choice, cost, month
    ("What did the group agree about the {subject}?",
     "They want {choice}.", "It costs {cost}.", "It opens in {month}."),
    ("Summarize the plans for the {subject}.",
     "Planned are {choice}.", "The price is {cost}.", "The opening is in {month}."),
    ("How will the {subject} be built?",
     "It gets {choice}.", "They pay {cost}.", "Work ends in {month}."),
    ("What was said about changes to the {subject}?",
     "New are {choice}.", "The budget is {cost}.", "It is ready by {month}."),
]  # fmt: skip
REPORTED = [
    ("What did the person who looks after the {subject} report?", "{name} said that {report}."),
    ("Who is in charge of the {subject} and what did they find?", "{name} found that {report}."),
    ("What news is there from whoever runs the {subject}?", "According to {name}, {report}."),
    ("What has the one responsible for the {subject} noticed?", "{name} noticed that {report}."),
]
CHOICE_TURNS = [
    "So for the {subject} we take {choice}.",
    "Fine, the {subject} gets {choice} then.",
    "We all prefer {choice} for the {subject}.",
]
COST_TURNS = [
    "I make that {cost} for the {subject}.",
    "The offer for the {subject} came in at {cost}.",
    "Our treasurer allows {cost} for the {subject}.",
]
MONTH_TURNS = [
    "The {subject} should be finished in {month}.",
    "Everybody can come and see the {subject} in {month}.",
    "Put {month} down for the {subject}.",
]
OWNER_TURNS = [
    "{name} looks after the {subject} from now on.",
    "{name} is in charge of the {subject}.",
    "{name} runs the {subject} these days.",
    "{name} is now responsible for the {subject}.",
]
REPORT_TURNS = [
    "I saw that {report}.",
    "Let me add that {report}.",
    "Just so you know, {report}.",
    "This week {report}.",
]
DISTRACTOR_TURNS = [  # these share words with the questions and answer none
    "What did the group agree about the {subject} last year? I forget.",
    "We should summarize the plans for the {subject} some other time.",
    "I cannot say how the {subject} will be built.",
    "Was anything said about changes to the {subject}? Not to me.",
    "My neighbour asks who looks after the {subject}, and I had no report.",
    "Somebody in charge of the {subject} would find that funny.",
    "There is no news on the {subject} today.",
    "I never noticed the {subject} on my way here.",
]
SMALL_TALK = [
    "Can everybody hear me?", "Sorry, I was late because of the traffic.", "Could you pass the water, please?",
    "Right, shall we go on?", "I agree with all of that.", "Let us take a short break.",
    "That is a good point, {name}.",
    "Where did we stop, {name}?", "Thank you, {name}, that was clear.", "Hmm, I would have to think about it.",
    "Are there any more questions before we close?", "The coffee is cold again.",
]  # fmt: skip
SPEAKERS, AGREED_SUBJECTS, OWNED_SUBJECTS, SMALL_TALK_TURNS = 12, 3, 3, 9


def generate_document(number: int, seed: str) -> Iterator[dict]:
    """The questions about transcript `number`, as self-contained records.

    Each record also holds `evidence_hops`: for each hop, the numbers of the passages that only this hop can find.
    """
    rng = random.Random(f"{seed}/{number}")
    speakers = rng.sample(NAMES, SPEAKERS)
    subjects = [f"{kind} {subject}" for kind, subject in zip(
        rng.sample(SUBJECT_KINDS, AGREED_SUBJECTS + OWNED_SUBJECTS),
        rng.sample(SUBJECTS, AGREED_SUBJECTS + OWNED_SUBJECTS), strict=True)]  # fmt: skip
    owners = dict(zip(subjects[AGREED_SUBJECTS:], rng.sample(speakers, OWNED_SUBJECTS), strict=True))
    reports = {name: _report(rng) for name in speakers}

    turns: list[tuple[str, str, str | None]] = []  # speaker, text, key: the subject or person that it is evidence for
    questions = []  # question, reference, keys of the evidence of each hop, subject
    for subject in subjects:
        if subject in owners:
            name = owners[subject]
            question, reference = rng.choice(REPORTED)
            speaker = rng.choice([other for other in speakers if other != name])
            turns.append((speaker, rng.choice(OWNER_TURNS).format(subject=subject, name=name), subject))
            summary, keys = reference.format(name=name, report=reports[name]), [[subject], [name]]
        else:
            facts = {"choice": f"{_phrase(rng)} and {_phrase(rng)}", "cost": f"{rng.choice(NUMBERS)} thousand pounds",
                     "month": rng.choice(MONTHS)}  # fmt: skip
            question, *frames = rng.choice(AGREED)
            kept = rng.choice([(0, 1), (0, 2), (0, 1, 2)])
            for which in kept:
                wording = rng.choice((CHOICE_TURNS, COST_TURNS, MONTH_TURNS)[which])
                turns.append((rng.choice(speakers), wording.format(subject=subject, **facts), subject))
            summary, keys = " ".join(frames[which].format(**facts) for which in kept), [[subject]]
        questions.append((question, summary, keys, subject))
        turns += [(rng.choice(speakers), wording.format(subject=subject), None)
                  for wording in rng.sample(DISTRACTOR_TURNS, 3 if subject in owners else 1)]  # fmt: skip
    turns += [(name, rng.choice(REPORT_TURNS).format(report=report), name) for name, report in reports.items()]
    turns += [(rng.choice(speakers), wording.format(name=rng.choice(speakers)), None)
              for wording in rng.sample(SMALL_TALK, SMALL_TALK_TURNS)]  # fmt: skip
    rng.shuffle(turns)
    rng.shuffle(questions)

    passages = [f"{speaker}: {text}" for speaker, text, _ in turns]
    places = {}
    for place, (_, _, key) in enumerate(turns):
        places.setdefault(key, []).append(place)
    for which, (question, summary, keys, subject) in enumerate(questions):
        hops = [[place for key in hop for place in places[key]] for hop in keys]
        yield {
            "id": f"{seed}{number}.q{which}",
            "doc_id": f"{seed}{number}",
            "query": question.format(subject=subject),
            "passages": passages,
            "summary": summary,
            "evidence": sorted(place for hop in hops for place in hop),
            "evidence_hops": hops,
        }


def sample_records(split: str, num_documents: int) -> list[dict]:
    """Records of `num_documents` transcripts with six questions each; `split`, such as "train", is the seed."""
    return [record for number in range(num_documents) for record in generate_document(number, seed=split)]


def sample_examples(split: str, num_documents: int, max_examples: int | None = None) -> Examples:
    """The same as examples, at most `max_examples`; those about one transcript share its document."""

    def make() -> Iterator[Example]:
        documents: dict[str, Document] = {}
        records = (record for number in range(num_documents) for record in generate_document(number, seed=split))
        for record in itertools.islice(records, max_examples):
            document = documents.setdefault(record["doc_id"], Document(record["doc_id"], record["passages"]))
            words = [len(document.passages[place].split()) for place in record["evidence"]]
            yield Example(record["id"], record["query"], document, [record["summary"]], record["evidence"], words, None)

    return keep_examples("sample", [split, num_documents, max_examples], make)


def _phrase(rng: random.Random) -> str:
    return f"{rng.choice(QUALITIES)} {rng.choice(THINGS)}"


def _report(rng: random.Random) -> str:
    first, second = rng.sample(HAPPENINGS, 2)
    return f"{_phrase(rng)} {first} in the {rng.choice(PLACES)} and {_phrase(rng)} {second}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Writes the embedded data set to standard output as JSON Lines.")
    parser.add_argument("--split", default="validation", help="train, validation, or any word as another seed")
    parser.add_argument("--documents", type=int, default=50, help="transcripts, six questions each")
    options = parser.parse_args()
    for record in sample_records(options.split, options.documents):
        print(json.dumps(record))
