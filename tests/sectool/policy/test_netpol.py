"""NetworkPolicies in the engine: the examples of Kubernetes' documentation, and a second evaluator of its own code."""

from __future__ import annotations

import ipaddress
import os
import random
from typing import Any

import pytest
import yaml

from sectool.events import Action, DropReason
from sectool.labels import LabelSet
from sectool.policy import Engine, Party, Request, explain, parse, run_tests
from tests.sectool.policy.netpolreference import End, allowed, governed

CASES = int(os.environ.get("NETPOL_CASES", "4000"))
FLOWS = 100  # of one set of policies
NOW = 1_772_330_584_000_000
PROTOCOLS = {"TCP": 6, "UDP": 17, "SCTP": 132}


def pod(space: str, labels: str = "", address: str = "10.9.0.1", ports: str = "", **more: str) -> End:
    named: dict[str, tuple[str, int]] = {}
    for entry in filter(None, ports.split(",")):
        name, protocol, number = entry.split("/")
        named[name] = (protocol, int(number))
    pairs = dict(part.split("=") for part in filter(None, labels.split(",")))
    return End(address, space, pairs, {"kubernetes.io/metadata.name": space, **more}, named)


def outside(address: str) -> End:
    return End(address)


def party(end: End) -> Party:
    """As a worker would see it."""
    address = ipaddress.ip_address(end.address)
    if end.namespace is None:
        return Party(None, None, address)
    labels = {"k8s.ns": end.namespace, **{f"k8s.label.{k}": v for k, v in end.labels.items()}}
    labels |= {
        f"k8s.nslabel.{k}": v for k, v in end.namespace_labels.items() if k != "kubernetes.io/metadata.name"
    }
    labels |= {
        f"k8s.port.{name}": f"{port}/{protocol.lower()}" for name, (protocol, port) in end.ports.items()
    }
    return Party(LabelSet(labels), None, address)


def ask(engine: Engine, source: End, destination: End, protocol: str, port: int) -> bool:
    request = Request(party(source), party(destination), PROTOCOLS[protocol], port)
    return engine.evaluate(request, NOW).action is Action.ALLOW


# The examples of "Network Policies" and "Declare Network Policy" in the documentation of Kubernetes, by what they do.
EXAMPLES = {
    "test-network-policy": """
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: test-network-policy, namespace: default}
spec:
  podSelector: {matchLabels: {role: db}}
  policyTypes: [Ingress, Egress]
  ingress:
  - from:
    - ipBlock: {cidr: 172.17.0.0/16, except: [172.17.1.0/24]}
    - namespaceSelector: {matchLabels: {project: myproject}}
    - podSelector: {matchLabels: {role: frontend}}
    ports: [{protocol: TCP, port: 6379}]
  egress:
  - to:
    - ipBlock: {cidr: 10.0.0.0/24}
    ports: [{protocol: TCP, port: 5978}]
""",
    "and": """
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: one-element}
spec:
  podSelector: {}
  ingress:
  - from:
    - namespaceSelector: {matchLabels: {user: alice}}
      podSelector: {matchLabels: {role: client}}
""",
    "or": """
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: two-elements}
spec:
  podSelector: {}
  ingress:
  - from:
    - namespaceSelector: {matchLabels: {user: alice}}
    - podSelector: {matchLabels: {role: client}}
""",
    "default-deny-ingress": """
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: default-deny-ingress}
spec: {podSelector: {}, policyTypes: [Ingress]}
""",
    "allow-all-ingress": """
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: allow-all-ingress}
spec: {podSelector: {}, ingress: [{}], policyTypes: [Ingress]}
""",
    "default-deny-egress": """
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: default-deny-egress}
spec: {podSelector: {}, policyTypes: [Egress]}
""",
    "allow-all-egress": """
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: allow-all-egress}
spec: {podSelector: {}, egress: [{}], policyTypes: [Egress]}
""",
    "default-deny-all": """
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: default-deny-all}
spec: {podSelector: {}, policyTypes: [Ingress, Egress]}
""",
    "allow-egress-deny-ingress": """
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: allow-egress-deny-ingress}
spec: {podSelector: {}, policyTypes: [Egress, Ingress], egress: [{}], ingress: []}
""",
    "multi-port-egress": """
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: multi-port-egress, namespace: default}
spec:
  podSelector: {matchLabels: {role: db}}
  policyTypes: [Egress]
  egress:
  - to:
    - ipBlock: {cidr: 10.0.0.0/24}
    ports: [{protocol: TCP, port: 32000, endPort: 32768}]
""",
    "egress-namespaces": """
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: egress-namespaces}
spec:
  podSelector: {matchLabels: {app: myapp}}
  policyTypes: [Egress]
  egress:
  - to:
    - namespaceSelector:
        matchExpressions: [{key: namespace, operator: In, values: [frontend, backend]}]
""",
    "by-namespace-name": """
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: dns}
spec:
  podSelector: {}
  policyTypes: [Egress]
  egress:
  - to:
    - namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: kube-system}}
    ports: [{port: dns, protocol: UDP}]
""",
    "access-nginx": """
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: access-nginx}
spec:
  podSelector: {matchLabels: {app.kubernetes.io/name: nginx}}
  ingress:
  - from:
    - podSelector: {matchLabels: {access: "true"}}
""",
}

DB = pod("default", "role=db")
FRONT = pod("default", "role=frontend")
PLAIN = pod("default")
MINE = pod("mine", project="myproject")
ALICE, ALICES = pod("alice", "role=client", user="alice"), pod("alice", user="alice")
DNS = pod("kube-system", "k8s-app=kube-dns", ports="dns/UDP/5353")

TABLE: list[tuple[str, End, End, str, int, bool]] = [
    ("test-network-policy", FRONT, DB, "TCP", 6379, True),
    ("test-network-policy", FRONT, DB, "TCP", 6380, False),
    ("test-network-policy", FRONT, DB, "UDP", 6379, False),
    ("test-network-policy", PLAIN, DB, "TCP", 6379, False),
    ("test-network-policy", pod("other", "role=frontend"), DB, "TCP", 6379, False),
    ("test-network-policy", MINE, DB, "TCP", 6379, True),
    ("test-network-policy", outside("172.17.0.5"), DB, "TCP", 6379, True),
    ("test-network-policy", outside("172.17.1.5"), DB, "TCP", 6379, False),
    ("test-network-policy", outside("172.18.0.5"), DB, "TCP", 6379, False),
    ("test-network-policy", pod("other", address="172.17.0.9"), DB, "TCP", 6379, True),
    ("test-network-policy", DB, outside("10.0.0.7"), "TCP", 5978, True),
    ("test-network-policy", DB, outside("10.0.1.7"), "TCP", 5978, False),
    ("test-network-policy", DB, outside("10.0.0.7"), "TCP", 5979, False),
    ("test-network-policy", outside("192.0.2.1"), PLAIN, "TCP", 22, True),
    ("test-network-policy", PLAIN, outside("192.0.2.1"), "UDP", 53, True),
    ("and", ALICE, PLAIN, "TCP", 80, True),
    ("and", ALICES, PLAIN, "TCP", 80, False),
    ("and", pod("default", "role=client"), PLAIN, "TCP", 80, False),
    ("or", ALICES, PLAIN, "TCP", 80, True),
    ("or", pod("default", "role=client"), PLAIN, "TCP", 80, True),
    ("or", pod("other", "role=client"), PLAIN, "TCP", 80, False),
    ("default-deny-ingress", FRONT, DB, "TCP", 80, False),
    ("default-deny-ingress", DB, outside("192.0.2.1"), "TCP", 80, True),
    ("default-deny-ingress", FRONT, pod("other"), "TCP", 80, True),
    ("allow-all-ingress", outside("192.0.2.1"), DB, "SCTP", 80, True),
    ("default-deny-egress", DB, outside("192.0.2.1"), "TCP", 80, False),
    ("default-deny-egress", FRONT, DB, "TCP", 80, False),
    ("default-deny-egress", pod("other"), DB, "TCP", 80, True),
    ("allow-all-egress", DB, outside("192.0.2.1"), "TCP", 80, True),
    ("default-deny-all", pod("other"), DB, "TCP", 80, False),
    ("default-deny-all", DB, pod("other"), "TCP", 80, False),
    ("allow-egress-deny-ingress", DB, outside("192.0.2.1"), "TCP", 80, True),
    ("allow-egress-deny-ingress", FRONT, DB, "TCP", 80, False),
    ("allow-egress-deny-ingress", outside("192.0.2.1"), DB, "UDP", 53, False),
    ("allow-egress-deny-ingress", DB, pod("other"), "SCTP", 9, True),
    ("multi-port-egress", DB, outside("10.0.0.1"), "TCP", 31999, False),
    ("multi-port-egress", DB, outside("10.0.0.1"), "TCP", 32000, True),
    ("multi-port-egress", DB, outside("10.0.0.1"), "TCP", 32768, True),
    ("multi-port-egress", DB, outside("10.0.0.1"), "TCP", 32769, False),
    ("multi-port-egress", DB, outside("10.0.0.1"), "UDP", 32100, False),
    ("egress-namespaces", pod("default", "app=myapp"), pod("f", namespace="frontend"), "TCP", 1, True),
    ("egress-namespaces", pod("default", "app=myapp"), pod("f", namespace="other"), "TCP", 1, False),
    ("egress-namespaces", pod("default", "app=myapp"), pod("frontend"), "TCP", 1, False),
    ("by-namespace-name", PLAIN, DNS, "UDP", 5353, True),
    ("by-namespace-name", PLAIN, DNS, "TCP", 5353, False),
    ("by-namespace-name", PLAIN, DNS, "UDP", 53, False),
    ("by-namespace-name", PLAIN, pod("other", ports="dns/UDP/5353"), "UDP", 5353, False),
    (
        "access-nginx",
        pod("default", "access=true"),
        pod("default", "app.kubernetes.io/name=nginx"),
        "TCP",
        80,
        True,
    ),
    (
        "access-nginx",
        pod("default", "access=no"),
        pod("default", "app.kubernetes.io/name=nginx"),
        "TCP",
        80,
        False,
    ),
    (
        "access-nginx",
        pod("other", "access=true"),
        pod("default", "app.kubernetes.io/name=nginx"),
        "TCP",
        80,
        False,
    ),
]


@pytest.mark.parametrize(("name", "source", "destination", "protocol", "port", "expected"), TABLE)
def test_examples_of_the_documentation(
    name: str, source: End, destination: End, protocol: str, port: int, expected: bool
) -> None:
    text = EXAMPLES[name]
    assert ask(Engine(parse(text)), source, destination, protocol, port) is expected
    assert allowed(list(yaml.safe_load_all(text)), source, destination, protocol, port) is expected


# --- random worlds ----------------------------------------------------------------------------------------------------

KEYS, VALUES = ("app", "tier"), ("a", "b", "c")
SPACES = ("default", "shop", "ops")


def random_selector(rng: random.Random) -> dict[str, Any] | None:
    match rng.randrange(6):
        case 0:
            return {}
        case 1:
            return {"matchLabels": {rng.choice(KEYS): rng.choice(VALUES)}}
        case 2:
            return {"matchLabels": {key: rng.choice(VALUES) for key in KEYS}, "matchExpressions": []}
        case 3:
            return {"matchLabels": None, "matchExpressions": None}
        case _:
            expressions: list[dict[str, Any]] = []
            for _ in range(rng.randint(1, 2)):
                one: dict[str, Any] = {
                    "key": rng.choice([*KEYS, "kubernetes.io/metadata.name"]),
                    "operator": rng.choice(["In", "NotIn", "Exists", "DoesNotExist"]),
                }
                if "In" in one["operator"]:
                    one["values"] = rng.sample([*VALUES, *SPACES], rng.randint(1, 3))
                elif rng.random() < 0.5:
                    one["values"] = []
                expressions.append(one)
            return {"matchExpressions": expressions}


def random_peer(rng: random.Random) -> dict[str, Any]:
    if rng.random() < 0.3:
        block: dict[str, Any] = {"cidr": rng.choice(["10.0.0.0/8", "10.1.2.3/16", "0.0.0.0/0", "fd00::/8"])}
        if rng.random() < 0.5:
            block["except"] = {
                "10": ["10.1.0.0/24"],
                "0.": ["10.0.0.0/8", "192.0.2.0/24"],
                "fd": ["fd00:1::/32"],
            }[block["cidr"][:2]]
        return {"ipBlock": block}
    out: dict[str, Any] = {}
    while not out:
        for field in ("podSelector", "namespaceSelector"):
            if rng.random() < 0.5:
                out[field] = random_selector(rng)
    return out


def random_port(rng: random.Random) -> dict[str, Any]:
    out: dict[str, Any] = {}
    if rng.random() < 0.6:
        out["protocol"] = rng.choice(["TCP", "TCP", "UDP", "SCTP", None])
    match rng.randrange(4):
        case 0:
            out["port"] = rng.choice([80, 443])
        case 1:
            out |= {"port": 80, "endPort": rng.choice([80, 90, 443])}
        case 2:
            out["port"] = rng.choice(["http", "dns"])
    return out


def random_rules(rng: random.Random, peers: str) -> Any:
    rules: list[Any] = []
    for _ in range(rng.randint(0, 2)):
        rule: dict[str, Any] = {}
        for field, make in ((peers, random_peer), ("ports", random_port)):
            match rng.randrange(5):
                case 0:
                    rule[field] = rng.choice([None, []])
                case 1:
                    pass
                case _:
                    rule[field] = [make(rng) for _ in range(rng.randint(1, 2))]
        rules.append(rule)
    return rules


def random_policy(rng: random.Random, number: int) -> dict[str, Any]:
    metadata = {"name": f"p{number}"}
    if rng.random() < 0.8:
        metadata["namespace"] = rng.choice(SPACES)
    spec: dict[str, Any] = {}
    if rng.random() < 0.9:
        spec["podSelector"] = random_selector(rng)
    if rng.random() < 0.6:
        spec["policyTypes"] = rng.choice([["Ingress"], ["Egress"], ["Egress", "Ingress"], [], None])
    for direction, peers in (("ingress", "from"), ("egress", "to")):
        if rng.random() < 0.7:
            spec[direction] = rng.choice([random_rules(rng, peers), random_rules(rng, peers), None, [{}]])
    return {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": metadata, "spec": spec}


def random_end(rng: random.Random) -> End:
    address = rng.choice(
        ["10.1.0.7", "10.1.9.7", "10.77.0.1", "192.0.2.9", "203.0.113.1", "fd00:1::1", "fd00:2::1"]
    )
    if rng.random() < 0.2:
        return End(address)
    namespace = rng.choice([*SPACES, "idle"])
    labels = {key: rng.choice(VALUES) for key in KEYS if rng.random() < 0.7}
    space = {"kubernetes.io/metadata.name": namespace}
    if namespace != "idle":
        space |= {"app": VALUES[SPACES.index(namespace)], "tier": "a"}
    ports: dict[str, tuple[str, int]] = {}
    if rng.random() < 0.5:
        ports = {"http": (rng.choice(["TCP", "UDP"]), rng.choice([80, 8080])), "dns": ("UDP", 53)}
    return End(address, namespace, labels, space, ports)


def test_the_engine_says_what_the_other_evaluator_says() -> None:
    seed = int(os.environ.get("NETPOL_SEED", "0")) or random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}, {CASES} cases")
    rng = random.Random(seed)
    verdicts = {True: 0, False: 0}
    for _ in range(CASES // FLOWS):
        policies = [random_policy(rng, number) for number in range(rng.randint(1, 4))]
        text = yaml.safe_dump_all(policies)
        engine = Engine(parse(text))
        loaded = list(yaml.safe_load_all(text))
        for _ in range(FLOWS):
            source, destination = random_end(rng), random_end(rng)
            protocol, port = rng.choice(["TCP", "TCP", "UDP", "SCTP"]), rng.choice([53, 80, 85, 443, 8080])
            expected = allowed(loaded, source, destination, protocol, port)
            if not governed(loaded, source) and not governed(loaded, destination):
                expected = False  # neither namespace is under the regime: what is not allowed is denied
            found = ask(engine, source, destination, protocol, port)
            assert found is expected, f"seed {seed}\n{text}\n{source} -> {destination} {protocol}/{port}"
            verdicts[found] += 1
    assert min(verdicts.values()) > CASES // 20


# --- beside policies of our own ---------------------------------------------------------------------------------------

WITH = EXAMPLES["access-nginx"] + "---\n"
NGINX, FRIEND, STRANGER = (
    pod("default", labels) for labels in ("app.kubernetes.io/name=nginx", "access=true", "access=no")
)


def decide(text: str, source: End, destination: End, **more: Any) -> Any:
    return Engine(parse(text)).evaluate(Request(party(source), party(destination), 6, 80, **more), NOW)


def test_the_deciding_rule_is_named() -> None:
    decision = decide(WITH, FRIEND, NGINX)
    assert decision.rule.title == "NetworkPolicy default/access-nginx, rule 1 (owner security)"
    assert decision.rule.text == "ingress from pods access=true of its namespace"
    engine = Engine(parse(WITH))
    assert engine.rule(decision.rule.id) == decision.rule
    unisolated = decide(WITH, NGINX, STRANGER)
    assert unisolated.rule.text == "pods of namespace default that no NetworkPolicy isolates"
    denied = decide(WITH, STRANGER, NGINX)
    assert (denied.action, denied.reason) == (Action.DENY, DropReason.DEFAULT_DENY)


def test_explanations_name_the_policies_that_isolate() -> None:
    lines = explain(Engine(parse(WITH)), Request(party(STRANGER), party(NGINX), 6, 80), NOW).lines()
    assert any("isolated for ingress by NetworkPolicy default/access-nginx" in line for line in lines)
    egress = explain(
        Engine(parse(EXAMPLES["default-deny-all"])), Request(party(FRIEND), party(pod("x")), 6, 80), NOW
    )
    assert egress.isolated == (("egress", ("default/default-deny-all",)),)
    assert not explain(Engine(parse(WITH)), Request(party(FRIEND), party(NGINX), 6, 80), NOW).isolated


def test_guardrails_and_denials_come_first_policies_add() -> None:
    rules = "kind: {}\nname: own\nowner: me\nrules: ['{}']\n"
    wide = "k8s.label.access=no to call k8s.label.app.kubernetes.io/name=nginx"
    assert decide(WITH + rules.format("Policy", f"allow {wide}"), STRANGER, NGINX).action is Action.ALLOW
    assert decide(WITH + rules.format("Policy", f"audit {wide}"), STRANGER, NGINX).action is Action.AUDIT
    denied = decide(WITH + rules.format("Guardrail", "deny k8s.label.access to call any"), FRIEND, NGINX)
    assert denied.reason is DropReason.GUARDRAIL_DENY
    denied = decide(WITH + rules.format("Policy", "deny k8s.label.access to call any"), FRIEND, NGINX)
    assert denied.reason is DropReason.INTENT_DENY
    boxed = WITH + rules.format("Guardrail", "require encryption for any to call any")
    assert decide(boxed, FRIEND, NGINX).reason is DropReason.ENCRYPTION_UNAVAILABLE
    assert decide(boxed, FRIEND, NGINX, can_encrypt=True).encrypt
    audited = WITH + rules.format("Policy", "audit any to call any")
    assert decide(audited, FRIEND, NGINX).action is Action.ALLOW


def test_staged_policies_are_pending() -> None:
    staged = EXAMPLES["default-deny-ingress"].replace(
        "metadata: {", "metadata: {annotations: {sectool/mode: stage, sectool/owner: team-shop}, "
    )
    decision = decide(WITH + staged, FRIEND, NGINX)
    assert (decision.action, decision.pending_action) == (Action.ALLOW, Action.ALLOW)  # additive
    alone = decide(staged, FRIEND, NGINX)
    assert (alone.action, alone.pending_action) == (Action.DENY, Action.DENY)
    elsewhere = decide(WITH + staged, FRIEND, STRANGER)
    assert (elsewhere.action, elsewhere.pending_action) == (Action.ALLOW, Action.DENY)
    off = staged.replace("mode: stage", "mode: off")
    assert decide(off, FRIEND, NGINX).action is Action.DENY


def test_a_namespace_without_policies_is_not_opened() -> None:
    assert decide(WITH, pod("other"), pod("third")).action is Action.DENY
    assert decide(WITH, pod("other"), outside("192.0.2.1")).action is Action.DENY


def test_a_partners_labels_make_no_pod() -> None:
    labels = {
        "k8s.ns": "default",
        "k8s.label.access": "true",
        "domain": "partner.example",
        "federated": "true",
    }
    request = Request(Party(LabelSet(labels)), party(NGINX), 6, 80)
    assert Engine(parse(WITH)).evaluate(request, NOW).action is Action.DENY


def test_plain_labels_stand_for_pod_labels_that_are_not_there() -> None:
    workload = Party(LabelSet({"k8s.namespace": "default", "access": "true"}))
    assert Engine(parse(WITH)).evaluate(Request(workload, party(NGINX), 6, 80), NOW).action is Action.ALLOW


def test_test_documents_speak_of_pods() -> None:
    nginx = "k8s.ns=default,k8s.label.app.kubernetes.io/name=nginx tcp/80"
    text = WITH + (
        "kind: Test\nname: nginx\n"
        f"allow: ['k8s.ns=default,k8s.label.access=true -> {nginx}']\n"
        f"deny: ['k8s.ns=default -> {nginx}']\n"
    )
    assert all(result.passed for result in run_tests(parse(text)))
