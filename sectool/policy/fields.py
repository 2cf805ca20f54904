"""One YAML document to one domain value: strict, and every refusal points at the word.

Nothing is ever ignored. A field, kind, mode or match key that is not known is an error, because a misspelt
`mode: stage` that silently enforces is the worst thing a policy tool can do.
"""

from __future__ import annotations

import re
from typing import Final

from sectool.labels import MAX_LABELS, LabelError, LabelSet, check_label
from sectool.origins import Origin, refusal
from sectool.policy.flow import PartySpec, parse_flow, sample
from sectool.policy.model import (
    Document,
    DocumentKind,
    Expectation,
    Mode,
    NetworkDoc,
    PolicyDoc,
    RuleDoc,
    TestDoc,
    WorkloadDoc,
)
from sectool.policy.network import IPNetwork, NetworkSpec, parse_cidr
from sectool.policy.selector import NETWORK_NAME, NamedNet
from sectool.policy.sentence import Verb, parse_sentence
from sectool.policy.yamlpos import Items, Node, Scalar, Table, bad_character, closest

_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9 ._/-]{0,61}[A-Za-z0-9])?")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_UNIT = re.compile(r"[A-Za-z0-9:_.\\@-]{1,255}")

MATCH_KEYS: Final = (
    *("systemd.unit", "user", "executable", "sha256", "cgroup"),
    *("container.id", "container.runtime", "container.name", "container.image", "container.digest"),
    *("k8s.namespace", "k8s.pod", "k8s.pod-uid", "k8s.serviceaccount"),
)
_MATCH_LABEL: Final = "container.label."  # followed by any key
_MATCH_PREFIX: Final = (
    "executable",
    "cgroup",
    "container.name",
    "container.image",
    "k8s.pod",
)  # a * may end them
_FIELDS: Final[dict[DocumentKind, tuple[str, ...]]] = {
    DocumentKind.POLICY: ("kind", "name", "owner", "mode", "description", "rules"),
    DocumentKind.GUARDRAIL: ("kind", "name", "owner", "mode", "description", "rules"),
    DocumentKind.NETWORK: ("kind", "name", "owner", "description", "cidrs", "except"),
    DocumentKind.WORKLOAD: ("kind", "name", "owner", "description", "match", "labels"),
    DocumentKind.TEST: ("kind", "name", "owner", "mode", "description", "allow", "deny"),
    DocumentKind.NETWORK_POLICY: (),
}


class Fields:
    """Reads one document; `references` are the Network names it uses, with the sentences that do."""

    def __init__(self, node: Node) -> None:
        if not isinstance(node, Table):
            raise node.fail("a document must be a mapping", "e.g. kind: Policy on its first line")
        self.table = node
        self.references: list[tuple[str, Scalar]] = []
        self.kind = self._kind()
        for key, (key_node, _) in node.entries.items():
            if key not in _FIELDS[self.kind]:
                raise key_node.fail(
                    f"a {self.kind} has no field {key!r}",
                    closest(key, _FIELDS[self.kind]) or f"its fields are {', '.join(_FIELDS[self.kind])}",
                )
        self.name_node = self._scalar("name")

    def document(self) -> Document:
        match self.kind:
            case DocumentKind.POLICY | DocumentKind.GUARDRAIL:
                return self._policy()
            case DocumentKind.NETWORK:
                return self._network()
            case DocumentKind.WORKLOAD:
                return self._workload()
            case (
                DocumentKind.TEST | DocumentKind.NETWORK_POLICY
            ):  # the latter never comes here: see documents
                return self._test()

    def _policy(self) -> PolicyDoc:
        return PolicyDoc(
            self.kind,
            self._name(),
            self._text("owner", required=True),
            self._rules(),
            self._mode(),
            self._text("description"),
            self.name_node.where,
        )

    def _rules(self) -> tuple[RuleDoc, ...]:
        out: list[RuleDoc] = []
        seen: dict[str, str] = {}
        for item in self._list("rules", required=True):
            node = self._word(
                item, "a rule", "one sentence; if it contains ': ', put the whole rule in single quotes"
            )
            sentence = parse_sentence(node)
            guardrail = self.kind is DocumentKind.GUARDRAIL
            if guardrail and sentence.verb not in (Verb.DENY, Verb.REQUIRE):
                raise node.fail(
                    f"a Guardrail cannot {sentence.verb}",
                    "guardrails say 'deny' or 'require encryption for'; a Policy says what is allowed",
                )
            if not guardrail and sentence.verb is Verb.REQUIRE:
                raise node.fail(
                    "a Policy cannot require encryption for others",
                    "put it into a Guardrail, or end an allow rule with 'encrypted'",
                )
            canonical = str(sentence)
            if canonical in seen:
                raise node.fail("this rule is given twice", f"the other one is at {seen[canonical]}")
            seen[canonical] = node.where
            for side in (sentence.source, sentence.destination):
                if isinstance(side, NamedNet):
                    self.references.append((side.name, node))
            out.append(RuleDoc(sentence, node.where))
        return tuple(out)

    def _network(self) -> NetworkDoc:
        node = self.name_node
        if not NETWORK_NAME.fullmatch(node.value):
            raise node.fail(
                f"{node.value!r} is not a network name",
                "a letter, then letters, digits and . _ - : it must fit behind net: in a sentence",
            )
        cidrs = self._cidrs("cidrs", required=True)
        excepts = self._cidrs("except")
        for text, net in excepts:
            if not any(_inside(net, outer) for _, outer in cidrs):
                raise text.fail(
                    f"{net} is not inside any of cidrs, so it excepts nothing", "correct or remove it"
                )
        spec = NetworkSpec(tuple(n for _, n in cidrs), tuple(n for _, n in excepts))
        if sample(spec) is None:
            raise node.fail("this network holds no address: everything is excepted", "remove an exception")
        return NetworkDoc(node.value, spec, self._text("owner"), self._text("description"), node.where)

    def _cidrs(self, field: str, *, required: bool = False) -> list[tuple[Scalar, IPNetwork]]:
        out: list[tuple[Scalar, IPNetwork]] = []
        for item in self._list(field, required=required):
            node = self._word(item, "a network", "e.g. 10.0.0.0/8")
            try:
                network = parse_cidr(node.value)
            except ValueError as error:
                message, _, hint = str(error).partition("; ")
                raise node.fail(message, hint) from None
            if any(network == other for _, other in out):
                raise node.fail(f"{network} is given twice", "keep one of them")
            out.append((node, network))
        return out

    def _workload(self) -> WorkloadDoc:
        match: list[tuple[str, str]] = []
        for key_node, value in self._map("match"):
            if key_node.value not in MATCH_KEYS and not key_node.value.startswith(_MATCH_LABEL):
                raise key_node.fail(
                    f"a workload cannot be matched by {key_node.value!r}",
                    closest(key_node.value, MATCH_KEYS) or f"it can by {', '.join(MATCH_KEYS)}",
                )
            match.append((key_node.value, _match_value(key_node.value, value)))
        labels: dict[str, str] = {}
        for key_node, value in self._map("labels"):
            try:
                check_label(key_node.value, "")
            except LabelError as error:
                raise key_node.fail(str(error), "rename the label") from None
            if why := refusal(key_node.value, Origin.OPERATOR):
                raise key_node.fail(why, "choose another key")
            try:
                check_label(key_node.value, value.value)
            except LabelError as error:
                raise value.fail(str(error), "choose a value that labels can have") from None
            if len(labels) == MAX_LABELS:
                raise key_node.fail(f"more than {MAX_LABELS} labels", "keep those that policy asks for")
            labels[key_node.value] = value.value
        return WorkloadDoc(
            self._name(),
            tuple(sorted(match)),
            LabelSet(labels),
            self._text("owner"),
            self._text("description"),
            self.name_node.where,
        )

    def _test(self) -> TestDoc:
        out: list[Expectation] = []
        for field in ("allow", "deny"):
            for item in self._list(field):
                node = self._word(item, "a flow", "e.g. 'app=web -> app=db tcp/5432'")
                flow = parse_flow(node)
                if flow.encrypted and field == "deny":
                    raise node.fail(
                        "a flow that must be denied cannot be encrypted",
                        "remove 'encrypted'",
                        node.value.rfind("encrypted"),
                    )
                for side in (flow.source, flow.destination):
                    self._refer(side, node)
                out.append(Expectation(flow, field == "allow", node.value, node.where))
        if not out:
            raise self.table.fail("a Test without allow and deny tests nothing", "give at least one flow")
        name = self._text("name", required=True)
        return TestDoc(
            name,
            tuple(out),
            self._mode(),
            self._text("owner"),
            self._text("description"),
            self.name_node.where,
        )

    def _refer(self, side: PartySpec, node: Scalar) -> None:
        if isinstance(side.place, NamedNet):
            self.references.append((side.place.name, node))

    def _kind(self) -> DocumentKind:
        kinds = [k.value for k in DocumentKind]
        if "kind" not in self.table.entries:
            raise self.table.fail("this document has no 'kind'", f"one of {', '.join(kinds)}")
        node = self._word(self.table.entries["kind"][1], "a kind", f"one of {', '.join(kinds)}")
        if node.value not in kinds:
            raise node.fail(
                f"there is no kind {node.value!r}",
                closest(node.value, kinds) or f"the kinds are {', '.join(kinds)}",
            )
        return DocumentKind(node.value)

    def _mode(self) -> Mode:
        if "mode" not in self.table.entries:
            return Mode.ENFORCE
        node = self._scalar("mode")
        modes = [m.value for m in Mode]
        if node.value not in modes:
            raise node.fail(
                f"there is no mode {node.value!r}", closest(node.value, modes) or "enforce, stage or off"
            )
        return Mode(node.value)

    def _name(self) -> str:
        if not _NAME.fullmatch(self.name_node.value):
            raise self.name_node.fail(
                f"{self.name_node.value!r} is not a name",
                "letters, digits, spaces and . _ / - inside, at most 63 characters",
            )
        return self.name_node.value

    def _text(self, field: str, *, required: bool = False) -> str:
        if field not in self.table.entries and not required:
            return ""
        node = self._scalar(field)
        bad = bad_character(node.value, "\n" if field == "description" else "")
        if bad >= 0:
            raise node.fail(
                f"character U+{ord(node.value[bad]):04X} may not stand in {field!r}",
                "remove it; control and invisible characters are refused",
                bad,
            )
        limit = 2000 if field == "description" else 120
        if len(node.value) > limit:
            raise node.fail(
                f"{field!r} has {len(node.value)} characters; at most {limit} are kept", "shorten it"
            )
        return node.value.strip()

    def _scalar(self, field: str) -> Scalar:
        if field not in self.table.entries:
            raise self.table.fail(f"this {self.kind} has no {field!r}", f"add a line '{field}: …'")
        return self._word(self.table.entries[field][1], repr(field), f"write '{field}: TEXT'")

    def _word(self, node: Node, what: str, hint: str = "") -> Scalar:
        if not isinstance(node, Scalar):
            raise node.fail(
                f"{what} must be a text, not a {'list' if isinstance(node, Items) else 'mapping'}", hint
            )
        if node.is_null or not node.value.strip():
            raise node.fail(f"{what} is empty", hint)
        return node

    def _list(self, field: str, *, required: bool = False) -> tuple[Node, ...]:
        if field not in self.table.entries:
            if required:
                raise self.table.fail(
                    f"this {self.kind} has no {field!r}", f"add '{field}:' with at least one entry"
                )
            return ()
        key, node = self.table.entries[field]
        if not isinstance(node, Items):
            if isinstance(node, Scalar) and node.is_null:
                raise key.fail(f"{field!r} is empty", "give at least one entry, or remove the field")
            raise node.fail(f"{field!r} must be a list", f"put '- ' in front: {field}: [ … ]")
        if not node.items:
            raise node.fail(f"{field!r} is empty", "give at least one entry, or remove the field")
        return node.items

    def _map(self, field: str) -> list[tuple[Scalar, Scalar]]:
        if field not in self.table.entries:
            raise self.table.fail(f"this {self.kind} has no {field!r}", f"add '{field}: {{key: value}}'")
        key, node = self.table.entries[field]
        if not isinstance(node, Table) or not node.entries:
            at = key if isinstance(node, Scalar) and node.is_null else node
            raise at.fail(
                f"{field!r} must be a mapping with at least one entry", f"e.g. {field}: {{key: value}}"
            )
        return [(k, self._word(v, f"{k.value!r}", "write KEY: VALUE")) for k, v in node.entries.values()]


def _inside(inner: IPNetwork, outer: IPNetwork) -> bool:
    return (
        inner.version == outer.version
        and inner.prefixlen >= outer.prefixlen
        and inner.network_address in outer
    )


def _match_value(key: str, node: Scalar) -> str:
    """A checked value of a workload's match key."""
    value = node.value
    bad = bad_character(value)
    if bad >= 0:
        raise node.fail(f"character U+{ord(value[bad]):04X} may not stand here", "remove it", bad)
    if len(value) > 4096:
        raise node.fail(f"{len(value)} characters; no {key} is that long", "shorten it, or end it with a *")
    star = value.find("*")
    if star >= 0 and not (key in _MATCH_PREFIX and star == len(value) - 1):
        hint = f"only {', '.join(_MATCH_PREFIX)} take a *, and only at their end"
        raise node.fail(f"'*' cannot stand here in {key!r}", hint, star)
    if key in ("executable", "cgroup") and not value.startswith("/"):
        what = "as under /sys/fs/cgroup" if key == "cgroup" else "of the program file"
        raise node.fail(f"{key} {value!r} does not start with /", f"give the full path {what}")
    if key == "sha256":
        value = value.lower()
        if not _SHA256.fullmatch(value):
            raise node.fail("this is not a SHA-256", "64 hexadecimal digits, as sha256sum prints them")
    if key == "systemd.unit" and not (_UNIT.fullmatch(value) and "." in value):
        raise node.fail(
            f"{value!r} is not a systemd unit name", f"with its type, e.g. {value.split('.')[0]}.service"
        )
    if key == "user" and (":" in value or "/" in value or " " in value):
        raise node.fail(f"{value!r} is not a user name", "a name as in /etc/passwd, or a number")
    return value
