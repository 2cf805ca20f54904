"""Random documents and flows in a world small enough that rules meet often."""

from __future__ import annotations

import ipaddress
import os
import random

from hypothesis import strategies as st

from sectool.labels import LabelSet
from sectool.policy import Party, Request

LONG = int(os.environ.get("SECTOOL_POLICY_CASES", "0"))  # cases per property in a long run; 0: a short one

NETWORKS = """kind: Network
name: lan
cidrs: [10.0.0.0/8, "fd00::/8"]
except: [10.9.0.0/16]
---
kind: Network
name: world
cidrs: [0.0.0.0/0, "::/0"]
except: [10.0.0.0/8, "fd00::/8"]
---
"""

_KEYS = ("a", "b")
_VALUES = ("1", "2", "12", '""')


def _value(text: str) -> str:
    return "" if text == '""' else text


clauses = st.one_of(
    st.builds("{}={}".format, st.sampled_from(_KEYS), st.sampled_from(_VALUES)),
    st.builds("{}!={}".format, st.sampled_from(_KEYS), st.sampled_from(_VALUES)),
    st.builds("{} in (1,{})".format, st.sampled_from(_KEYS), st.sampled_from(("2", "12"))),
    st.builds("{} notin (1,{})".format, st.sampled_from(_KEYS), st.sampled_from(("2", "12"))),
    st.builds("{}=1*".format, st.sampled_from(_KEYS)),
    st.sampled_from(_KEYS),
    st.builds("!{}".format, st.sampled_from(_KEYS)),
)


def _joined(parts: list[str]) -> str:
    """Clauses that the grammar takes together: it refuses doubled ones, and two values for one key."""
    out: list[str] = []
    for part in parts:
        plain = part.replace("!=", "").partition("=")[1] == "=" and not part.endswith("*")
        same = [o for o in out if plain and o.partition("=")[0] == part.partition("=")[0] and "!" not in o]
        if part not in out and not same:
            out.append(part)
    return ",".join(out)


selectors = st.one_of(
    st.just("any"),
    st.lists(clauses, min_size=1, max_size=3).map(_joined),
    st.sampled_from(
        ("net:lan", "net:world", "net:10.9.0.0/16", "net:10.9.1.0/24", "fqdn:x.example", "fqdn:*.example")
    ),
)
services = st.sampled_from(
    ("", "", " on tcp/1", " on tcp/1-2", " on tcp", " on udp/1,tcp/2", " on icmp/3", " on icmp/3/1")
)
conditions = st.sampled_from(
    (
        *[""] * 6,
        " where source.a = destination.a",
        " where source.a != destination.b",
        " where source.b > 1",
        " where destination.a = 1",
        " where source.b != 2",
    )
)


def sentences(*verbs: str) -> st.SearchStrategy[str]:
    """Rule sentences with one of these verbs."""
    return st.builds(
        "{} {} to call {}{}{}".format, st.sampled_from(verbs), selectors, selectors, services, conditions
    )


def _documents(guard: list[str], intents: list[str], more: list[str], modes: tuple[str, str, str]) -> str:
    out = NETWORKS
    for kind, name, rules, mode in (
        ("Guardrail", "box", guard, modes[0]),
        ("Policy", "one", intents, modes[1]),
        ("Policy", "two", more, modes[2]),
    ):
        if rules:
            body = "".join(f"- {rule}\n" for rule in dict.fromkeys(rules))
            out += f"kind: {kind}\nname: {name}\nowner: team-{name}\nmode: {mode}\nrules:\n{body}---\n"
    return out


def _encrypted(rules: list[tuple[str, bool]]) -> list[str]:
    """Some of the rules that may say so, say `encrypted`."""
    out = []
    for rule, encrypted in rules:
        head, where, tail = rule.partition(" where ")
        fits = encrypted and rule.startswith(("allow", "audit"))
        out.append(f"{head}{' encrypted' if fits else ''}{where}{tail}")
    return out


_modes = st.sampled_from(("enforce", "enforce", "enforce", "stage"))
_intents = st.lists(
    st.tuples(sentences("allow", "allow", "deny", "audit"), st.booleans()), min_size=1, max_size=5
).map(_encrypted)
documents = st.builds(
    _documents,
    st.lists(sentences("deny", "require encryption for"), max_size=3),
    _intents,
    _intents,
    st.tuples(_modes, _modes, _modes),
)
enforced = st.builds(
    _documents,
    st.lists(sentences("deny", "require encryption for"), max_size=3),
    _intents,
    _intents,
    st.just(("enforce", "enforce", "enforce")),
)

_labels = st.dictionaries(st.sampled_from(_KEYS), st.sampled_from(_VALUES).map(_value), max_size=2)
_addresses = st.sampled_from(("10.0.0.1", "10.9.0.1", "10.9.1.1", "192.0.2.1", "fd00::1", "2001:db8::1"))
_names = st.sampled_from(
    (frozenset[str](), frozenset({"x.example"}), frozenset({"y.example"}), frozenset({"z.test"}))
)
parties = st.builds(
    lambda labels, address, names: Party(labels, None, ipaddress.ip_address(address), names),
    st.one_of(st.none(), _labels.map(LabelSet)),
    _addresses,
    _names,
)


def _request(source: Party, destination: Party, service: tuple[int, int, int], able: bool) -> Request:
    both = source.labels is not None and destination.labels is not None
    return Request(source, destination, *service, both and able)


requests = st.builds(
    _request,
    parties,
    parties,
    st.sampled_from(((6, 1, 0), (6, 2, 0), (6, 3, 0), (17, 1, 0), (1, 3, 1), (1, 3, 2), (47, 0, 0))),
    st.booleans(),
)


class Drawn:
    """The same world without hypothesis, for very many cases: everything from one `random.Random`."""

    def __init__(self, draw: random.Random) -> None:
        self.draw = draw

    def documents(self) -> str:
        """A guardrail and two policies of a few rules each."""
        verbs = (("deny", "require encryption for"), ("allow", "allow", "deny", "audit"), ("allow", "deny"))
        out = NETWORKS
        for (kind, name), chosen in zip(
            (("Guardrail", "box"), ("Policy", "one"), ("Policy", "two")), verbs, strict=True
        ):
            rules = {self._sentence(chosen): None for _ in range(self.draw.randrange(5))}
            if rules:
                mode = self.draw.choice(("enforce", "enforce", "stage"))
                body = "".join(f"- {rule}\n" for rule in rules)
                out += f"kind: {kind}\nname: {name}\nowner: team-{name}\nmode: {mode}\nrules:\n{body}---\n"
        return out

    def _sentence(self, verbs: tuple[str, ...]) -> str:
        choice = self.draw.choice
        verb = choice(verbs)
        services = choice(("", "", " on tcp/1", " on tcp/1-2", " on udp/1,tcp/2", " on icmp/3/1"))
        encrypted = choice((" encrypted", "", "")) if verb in ("allow", "audit") else ""
        where = choice(
            (
                *[""] * 6,
                " where source.a = destination.a",
                " where source.b > 1",
                " where destination.a != source.b",
            )
        )
        until = choice((*[""] * 8, " until 2020-01-01", " until 2100-01-01"))
        return f"{verb} {self._selector()} to call {self._selector()}{services}{encrypted}{where}{until}"

    def _selector(self) -> str:
        kind = self.draw.randrange(6)
        if kind == 0:
            return "any"
        if kind == 1:
            return self.draw.choice(
                ("net:lan", "net:world", "net:10.9.0.0/16", "fqdn:x.example", "fqdn:*.example")
            )
        forms = ("{}=1", "{}=2", '{}=""', "{}!=1", "{} in (1,12)", "{} notin (1,2)", "{}=1*", "{}", "!{}")
        return ",".join(
            self.draw.choice(forms).format(key) for key in self.draw.sample(_KEYS, self.draw.randrange(1, 3))
        )

    def request(self) -> Request:
        """A flow between two parties of this world."""
        service = self.draw.choice(
            ((6, 1, 0), (6, 2, 0), (6, 3, 0), (17, 1, 0), (1, 3, 1), (1, 3, 2), (47, 0, 0))
        )
        return _request(self._party(), self._party(), service, self.draw.random() < 0.8)

    def _party(self) -> Party:
        labels = None
        if self.draw.random() < 0.7:
            labels = LabelSet(
                {k: self.draw.choice(("1", "2", "12", "")) for k in _KEYS if self.draw.random() < 0.6}
            )
        names = frozenset(n for n in ("x.example", "y.example", "z.test") if self.draw.random() < 0.2)
        address = self.draw.choice(
            ("10.0.0.1", "10.9.0.1", "10.9.1.1", "192.0.2.1", "fd00::1", "2001:db8::1")
        )
        return Party(labels, None, ipaddress.ip_address(address), names)
