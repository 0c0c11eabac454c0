"""What a session keeps and a prompt reads of it, said once more and plainly.

No page is shared here, nothing is evicted: a session is a list of texts, each read as far as no
earlier text begins with the same pages.
"""

import json
import math
import re
from collections import Counter

PAGE, MARGIN, ASKING, RUN, SURE = 128, 16, 64, 8, 0.16


def words_of(text):
    return re.findall(r"\w+", text.lower())


class Truth:
    """Of one session; ``tokenizer`` is the model's."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        added = json.loads(tokenizer.backend_tokenizer.to_str())["added_tokens"]
        template = getattr(tokenizer, "chat_template", None) or ""
        # Blanks and tags of HTML may be tokens of their own, too.
        self.special = {
            each["id"]
            for each in added
            if each["special"] or (each["content"][0] in "<[" and each["content"] in template)
        }
        self.prompts = []
        # In the order in which they came: a page's whole text up to its end.
        self.pages = []

    def words(self, tokens):
        return words_of(self.tokenizer.decode(tokens, skip_special_tokens=True))

    def write(self, prompt, answer):
        self.prompts.append(list(prompt))
        text = [*prompt, *answer]
        for start in range(0, len(text), PAGE):
            upto = text[: start + PAGE]
            if upto in self.pages:
                continue
            self.pages = [
                old
                for old in self.pages
                if not ((len(old) - 1) // PAGE * PAGE == start and upto[: len(old)] == old)
            ]
            self.pages.append(upto)

    def own(self, prompt):
        """Where the words of ``prompt`` begin and end that are not every prompt's."""
        everybody = [*self.prompts, prompt]
        begin = 0
        while begin < min(map(len, everybody)) and len({p[begin] for p in everybody}) == 1:
            begin += 1
        while begin and not self.is_end(prompt[begin - 1], "ends"):
            begin -= 1
        back = 0
        while back < min(64, *map(len, everybody)) and len({p[-1 - back] for p in everybody}) == 1:
            back += 1
        end = len(prompt) - back
        while end < len(prompt) and not self.is_end(prompt[end], "begins"):
            end += 1
        return begin, max(begin, end)

    def is_end(self, token, where):
        text = self.tokenizer.decode([token])
        line = text.endswith("\n") if where == "ends" else text.startswith("\n")
        return token in self.special or line

    def bm25(self, text, others=None):
        """A score for each page, or each of ``others``, and the weight of the whole query."""
        bags = [Counter(self.words(page[(len(page) - 1) // PAGE * PAGE :])) for page in self.pages]
        lengths = [bag.total() for bag in bags]
        mean = max(sum(n * n for n in lengths) / max(sum(lengths), 1), 1)
        weight = {}
        for word in set(words_of(text)):
            having = sum(word in bag for bag in bags)
            weight[word] = math.log(1 + (len(bags) - having + 0.5) / (having + 0.5))
        scores = []
        for bag in bags if others is None else map(Counter, others):
            long = 1.5 * (1 - 0.75 + 0.75 * bag.total() / mean)
            known = {word: w for word, w in weight.items() if word in bag}
            scores.append(sum(w * bag[n] * 2.5 / (bag[n] + long) for n, w in known.items()))
        return scores, sum(weight.values())

    def read(self, prompt, how="auto", room=10**9):
        """The whole prompt that the model gets."""
        if not self.pages or how == "never":
            return list(prompt)
        begin, end = self.own(prompt)
        start = max(begin, end - ASKING)
        text = self.tokenizer.decode(prompt[start:end], True)
        parts = re.split(r"(?<=[.!?:\n])\s*", text)
        asked = [n for n, part in enumerate(parts) if len(words_of(part)) >= 3][-2:]
        ways = [parts[n] for n in asked] or [text]
        before = " ".join(parts[: asked[0]]) if asked else ""
        own = [prompt[n : min(n + PAGE, start)] for n in range(0, start, PAGE)]
        order, sure = [], -1
        for way in ways:
            pages, surer, score = self.about(way, prompt)
            if not pages or (order and surer <= sure):
                continue
            texts = [*map(self.words, own), words_of(before)]
            if how == "auto" and max(self.bm25(way, texts)[0]) >= score:
                continue
            order, sure = pages, surer
        if how == "auto" and sure <= SURE:
            return list(prompt)
        chosen = []
        for i in order[:2]:
            if len(self.passages([*chosen, i])) > room:
                break
            chosen.append(i)
        return prompt[:begin] + self.passages(chosen) + prompt[begin:]

    def about(self, text, prompt):
        """Pages with words of ``text`` not in ``prompt``; how sure the first is, and its score."""
        scores, most = self.bm25(text)
        order = sorted(range(len(scores)), key=lambda i: -scores[i])
        order = [i for i in order if scores[i] > 0 and not self.is_in(i, prompt)]
        if not order:
            return [], 0, 0
        unknown = math.log(1 + (len(scores) + 0.5) / 0.5)
        sure = scores[order[0]] / 2.5 / (most * unknown) ** 0.5
        return order, sure - 0.12 * math.log10(max(3, len(scores))), scores[order[0]]

    def is_in(self, index, prompt):
        page = self.pages[index][(len(self.pages[index]) - 1) // PAGE * PAGE :]
        run = min(RUN, len(page))
        runs = {tuple(page[i : i + run]) for i in range(len(page) - run + 1)}
        theirs = {tuple(prompt[i : i + run]) for i in range(len(prompt))}
        return 2 * len(runs & theirs) > len(runs)

    def passages(self, chosen):
        said = []
        chosen = sorted(chosen)
        while chosen:
            chain = [self.pages[chosen.pop(0)]]
            while chosen and self.pages[chosen[0]][: len(chain[-1])] == chain[-1]:
                if len(chain[-1]) % PAGE or len(self.pages[chosen[0]]) > len(chain[-1]) + PAGE:
                    break
                chain.append(self.pages[chosen.pop(0)])
            start = (len(chain[0]) - 1) // PAGE * PAGE
            text = chain[-1][max(0, start - MARGIN) :]
            later = [p for p in self.pages if len(chain[-1]) < len(p) <= len(chain[-1]) + PAGE]
            later = [p for p in later if p[: len(chain[-1])] == chain[-1]]
            if later and len(chain[-1]) % PAGE == 0:
                text = text + later[-1][len(chain[-1]) :][:MARGIN]
            said += [token for token in text if token not in self.special]
            said += self.tokenizer.encode("\n\n", add_special_tokens=False)
        return said
