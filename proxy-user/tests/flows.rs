//! kube-proxy's own unit-test matrices (kube-proxy.md, section 3): objects in, and where packets of each
//! kind of client then go. The whole chain without a kernel: the agent plans, its writes fill tables on
//! the host, and the datapath runs on those.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::net::{IpAddr, SocketAddr};
use std::time::Instant;

use portal::agent::Agent;
use portal::desired::Frontend;
use portal::desired::node_ports::NodePortAddresses;
use portal::model::{Node, ObjectName, Protocol};
use portal::plan::{Capacity, Lead, Op, Planner};
use portal::watch::{Update, kinds, raw};
use proxy_common::tables::{self, ServiceKey, Side};
use proxy_common::testing::{Hook, LINK, Packet, ends};
use proxy_common::{Outcome, Port, V4, V6};
use proxy_ebpf::datapath::Service;
use proxy_ebpf::datapath::socket::{Act, send};
use proxy_ebpf::testing::{Call, Host, HostFamily};
use serde::Deserialize;
use serde_json::{Value, json};

const NODE: &str = "test-node";
const CAPACITY: Capacity = Capacity { services: 1000, slots: 10_000, backends: 1000, ranges: 100 };

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct Case {
    name: String,
    #[serde(default)]
    services: Vec<String>,
    #[serde(default)]
    endpoints: Vec<String>,
    #[serde(default)]
    zone: Option<String>,
    /// The node's addresses, the primary one first; those of the file's head if there are none.
    #[serde(default)]
    node: Vec<String>,
    #[serde(default)]
    nodeport_addresses: Vec<String>,
    #[serde(default)]
    no_cluster_cidr: bool,
    #[serde(default)]
    masquerade_all: bool,
    flows: Vec<String>,
}

#[test]
fn golden_flows() {
    let cases: Vec<Case> = serde_saphyr::from_str(include_str!("golden/flows.yaml")).unwrap();
    assert!(cases.len() >= 60, "only {} cases were read", cases.len());
    let wrong: Vec<String> = cases.iter().flat_map(judge).collect();
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

fn judge(case: &Case) -> Vec<String> {
    let ops = plan(case);
    let (v4, v6) = (host::<V4>(case, &ops), host::<V6>(case, &ops));
    let mut wrong = Vec::new();
    for flow in &case.flows {
        let (question, wanted) = flow.split_once(" => ").expect("WHO -> WHERE => RESULT");
        let (who, to) = question.split_once(" -> ").expect("WHO -> WHERE");
        let (to, protocol) = to.split_once('/').unwrap_or((to, "TCP"));
        let to: SocketAddr = to.parse().unwrap_or_else(|e| panic!("{flow}: {e}"));
        let protocol = protocol_of(protocol);
        let got = if to.is_ipv4() {
            results(&v4, who, to, protocol)
        } else {
            results(&v6, who, to, protocol)
        };
        let wanted: BTreeSet<String> = wanted.split(' ').map(str::to_owned).collect();
        if got != wanted {
            wrong.push(format!("{}: {flow}\n  got {got:?}", case.name));
        }
    }
    wrong
}

fn protocol_of(name: &str) -> Protocol {
    match name {
        "TCP" => Protocol::Tcp,
        "UDP" => Protocol::Udp,
        "SCTP" => Protocol::Sctp,
        other => panic!("{other} is no protocol"),
    }
}

/// The node's addresses: of the case, or those of kube-proxy's tests.
fn addresses(case: &Case) -> Vec<IpAddr> {
    let usual = ["192.168.0.2", "192.168.1.2", "192.168.99.11", "2001:db8::1", "2001:db8:1::2"];
    let given = case.node.iter().map(String::as_str);
    let texts: Vec<&str> = if case.node.is_empty() { usual.into() } else { given.collect() };
    texts.iter().map(|text| text.parse().unwrap()).collect()
}

/// The writes of an agent that hears of the case's objects.
fn plan(case: &Case) -> Vec<Op> {
    let node = Node { name: NODE.to_owned(), ..Node::default() };
    let node_ports = match case.nodeport_addresses.as_slice() {
        [] => NodePortAddresses::Primary,
        ranges => NodePortAddresses::Within(ranges.iter().map(|r| r.parse().unwrap()).collect()),
    };
    let mut agent = Agent::new(node, node_ports, kinds(false), Planner::new(CAPACITY));
    let own = addresses(case);
    agent.set_addresses(own.iter().copied().collect());
    agent.hear(Update::Node(from(node_object(case, &own))));
    for text in &case.services {
        agent.hear(Update::Service(Box::new(from::<raw::Service>(service(text)))));
    }
    for (number, text) in case.endpoints.iter().enumerate() {
        agent.hear(Update::Slice(from(slice(number, text))));
    }
    let nodes = HashSet::from([ObjectName::new("", NODE)]);
    let names = |kind: &[String]| -> HashSet<ObjectName> {
        let word = |text: &String| text.split([':', ' ']).next().unwrap().to_owned();
        kind.iter().map(|text| ObjectName::new("default", &word(text))).collect()
    };
    let slices =
        (0..case.endpoints.len()).map(|number| ObjectName::new("default", &number.to_string()));
    for (kind, listed) in
        kinds(false).into_iter().zip([names(&case.services), slices.collect::<HashSet<_>>(), nodes])
    {
        agent.hear(Update::Listed(kind, listed));
    }
    agent.plan(Instant::now())
}

fn from<T: serde::de::DeserializeOwned>(object: Value) -> T {
    serde_json::from_value(object).unwrap()
}

fn node_object(case: &Case, own: &[IpAddr]) -> Value {
    let addresses: Vec<Value> =
        own.iter().map(|ip| json!({"type": "InternalIP", "address": ip})).collect();
    json!({
        "metadata": {"name": NODE, "labels": {"topology.kubernetes.io/zone": case.zone}},
        "status": {"addresses": addresses},
    })
}

/// `KEY=VALUE` pairs.
fn pairs<'a>(words: impl Iterator<Item = &'a str>) -> BTreeMap<&'a str, &'a str> {
    words.map(|word| word.split_once('=').unwrap_or_else(|| panic!("{word}?"))).collect()
}

/// A Service from a line such as `svc1 ip=172.30.0.41 ports=80 node=3001 lb=1.2.3.4 etp=Local`.
fn service(text: &str) -> Value {
    let (name, rest) = text.split_once(' ').unwrap();
    let pairs = pairs(rest.split(' '));
    let list = |key: &str| -> Vec<&str> {
        pairs.get(key).map(|value| value.split(',').collect()).unwrap_or_default()
    };
    let node_ports = list("node");
    let port = |(position, text): (usize, &&str)| {
        let (number, protocol) = text.split_once('/').unwrap_or((text, "TCP"));
        let node_port = node_ports.get(position).map(|port| port.parse::<u16>().unwrap());
        json!({"name": *text, "port": number.parse::<u16>().unwrap(), "protocol": protocol, "nodePort": node_port})
    };
    let ingress: Vec<Value> = list("lb")
        .iter()
        .map(|text| match text.split_once('+') {
            Some((ip, mode)) => json!({"ip": ip, "ipMode": mode}),
            None => json!({"ip": text}),
        })
        .collect();
    let kind = if pairs.contains_key("lb") { "LoadBalancer" } else { "NodePort" };
    json!({
        "metadata": {"name": name, "namespace": "default"},
        "spec": {
            "type": kind,
            "clusterIP": list("ip")[0],
            "clusterIPs": list("ip"),
            "ports": list("ports").iter().enumerate().map(port).collect::<Vec<Value>>(),
            "externalIPs": list("external"),
            "externalTrafficPolicy": pairs.get("etp").unwrap_or(&"Cluster"),
            "internalTrafficPolicy": pairs.get("itp").unwrap_or(&"Cluster"),
            "loadBalancerSourceRanges": list("ranges"),
        },
        "status": {"loadBalancer": {"ingress": ingress}},
    })
}

/// A slice from a line such as `svc1 80=8080: 10.0.1.1@test-node !terminating +zone-a 10.0.1.2`. Words
/// after an address are its conditions and hints.
fn slice(number: usize, text: &str) -> Value {
    let (head, endpoints) = text.split_once(": ").unwrap_or((text.trim_end_matches(':'), ""));
    let (service, ports) = head.split_once(' ').unwrap();
    let ports: Vec<Value> = pairs(ports.split(' '))
        .iter()
        .map(|(name, port)| {
            let protocol = name.split_once('/').map_or("TCP", |(_, protocol)| protocol);
            json!({"name": name, "protocol": protocol, "port": port.parse::<u16>().unwrap()})
        })
        .collect();
    let mut found: Vec<Value> = Vec::new();
    for word in endpoints.split(' ').filter(|word| !word.is_empty()) {
        match (word.strip_prefix('!'), word.strip_prefix('+')) {
            (Some(state), _) => found.last_mut().unwrap()["conditions"] = conditions(state),
            (_, Some(hint)) => add_hint(found.last_mut().unwrap(), hint),
            _ => {
                let (address, node) = word.split_once('@').unwrap_or((word, "other"));
                found.push(json!({"addresses": [address], "nodeName": node, "conditions": {"ready": true}}));
            }
        }
    }
    let is_v6 = found.iter().any(|e| e["addresses"][0].as_str().unwrap().contains(':'));
    json!({
        "metadata": {
            "name": number.to_string(),
            "namespace": "default",
            "labels": {"kubernetes.io/service-name": service},
        },
        "addressType": if is_v6 { "IPv6" } else { "IPv4" },
        "ports": ports,
        "endpoints": found,
    })
}

fn conditions(state: &str) -> Value {
    let (ready, serving, terminating) = match state {
        "terminating" => (false, true, true),
        "dead" => (false, false, true),
        "unready" => (false, false, false),
        "ready-terminating" => (true, false, true),
        other => panic!("{other} is no condition"),
    };
    json!({"ready": ready, "serving": serving, "terminating": terminating})
}

fn add_hint(endpoint: &mut Value, hint: &str) {
    if hint == "none" {
        endpoint["hints"] = json!({"forZones": []});
        return;
    }
    let (kind, name) = match hint.strip_prefix("node:") {
        Some(node) => ("forNodes", node),
        None => ("forZones", hint),
    };
    let hints = &mut endpoint["hints"][kind];
    match hints.as_array_mut() {
        Some(list) => list.push(json!({"name": name})),
        None => *hints = json!([{"name": name}]),
    }
}

/// Tables that hold what was planned.
fn host<F: HostFamily>(case: &Case, ops: &[Op]) -> Host<F> {
    let mut host = Host::<F>::new();
    let source = addresses(case).into_iter().find_map(F::address).unwrap_or(zero::<F>());
    host.way = tables::Way { source, link: LINK, mtu: 0, pad: 0, hop: zero::<F>() };
    host.settings.masquerade_all = case.masquerade_all.into();
    let pods: SocketAddr =
        if F::BITS == 32 { "10.0.0.0:8" } else { "[fd00:10::]:32" }.parse().unwrap();
    let bits = u8::try_from(pods.port()).unwrap();
    host.pods = (!case.no_cluster_cidr).then_some((pods.ip(), bits));
    for op in ops {
        match op {
            Op::Backend { number, backend, .. } => {
                let Some(addr) = F::address(backend.address.ip()) else { continue };
                let flags = [
                    (backend.serving, tables::Backend::<F>::SERVING),
                    (backend.local, tables::Backend::<F>::LOCAL),
                    (backend.usable, tables::Backend::<F>::IN_CLUSTER),
                    (backend.usable_local, tables::Backend::<F>::IN_LOCAL),
                ];
                let flags = flags.iter().filter(|(set, _)| *set).map(|(_, flag)| flag).sum();
                let written = tables::Backend {
                    addr,
                    port: Port::new(backend.address.port()),
                    generation: backend.generation,
                    flags,
                    service: backend.service,
                    way: 1,
                    weight: backend.weight,
                    pad: 0,
                };
                host.set_backend(*number, written);
            }
            Op::Slots { first, numbers } => {
                (*first..).zip(numbers).for_each(|(index, number)| host.set_slot(index, *number));
            }
            Op::Lead { frontend, lead } => {
                let Frontend { vip, port, protocol } = *frontend;
                let Some(vip) = F::address(vip) else { continue };
                let key = ServiceKey::new(vip, Port::new(port), protocol.number());
                let Lead { id, cluster, local, affinity, flags } = *lead;
                host.put(&key, Service { id, cluster, local, affinity, flags });
            }
            Op::Mark { address, flags } => {
                if let Some(address) = F::address(*address) {
                    host.mark(address, *flags);
                }
            }
            Op::Allow { id, range } => host.ranges.push((*id, range.addr(), range.prefix_len())),
            Op::Name { .. } => {}
            other => panic!("a first plan has no {other:?}"),
        }
    }
    host
}

fn zero<F: HostFamily>() -> F::Addr {
    bytemuck::Zeroable::zeroed()
}

/// What becomes of new flows: the backends that they reach, with `~` if the client's address does not
/// stay; or REJECT, DROP, `-` for what is not touched.
fn results<F: HostFamily>(
    host: &Host<F>,
    who: &str,
    to: SocketAddr,
    protocol: Protocol,
) -> BTreeSet<String> {
    if who == "node" {
        return (0..200).map(|cookie| called(host, to, protocol, cookie)).collect();
    }
    let v6 = to.is_ipv6();
    let pick = |[v4, of_v6]: [&str; 2]| -> IpAddr { if v6 { of_v6 } else { v4 }.parse().unwrap() };
    let (hook, ip) = match who {
        "pod" => (Hook::Ingress, pick(["10.0.0.2", "fd00:10::2"])),
        "other-pod" => (Hook::Uplink, pick(["10.99.0.2", "fd00:10:99::2"])),
        "external" => (Hook::Uplink, pick(["203.0.113.2", "2001:db8:113::2"])),
        "blocked" => (Hook::Uplink, pick(["203.0.113.130", "2001:db8:114::2"])),
        address => (Hook::Ingress, address.parse().unwrap()),
    };
    let ports = 20_000..20_200;
    ports.map(|port| sent(host, hook, SocketAddr::new(ip, port), to, protocol)).collect()
}

fn sent<F: HostFamily>(
    host: &Host<F>,
    hook: Hook,
    src: SocketAddr,
    to: SocketAddr,
    protocol: Protocol,
) -> String {
    let packet = match protocol {
        Protocol::Tcp => Packet::tcp(Side::Ingress, src, to, 2),
        _ => Packet::udp(Side::Ingress, src, to),
    };
    let packet = match protocol {
        Protocol::Sctp => Packet { transport: proxy_common::testing::Transport::Sctp, ..packet },
        _ => packet,
    };
    let (outcome, frame) = host.see(hook, &packet.frame());
    match outcome {
        Outcome::Opened | Outcome::Hairpin => {
            // As it leaves, if that is by an uplink.
            let [seen_as, backend] = ends(&host.see(Hook::Egress, &frame).1);
            let stays = seen_as.ip() == src.ip();
            format!("{backend}{}", if stays { "" } else { "~" })
        }
        Outcome::Reset | Outcome::Unreachable => "REJECT".to_owned(),
        Outcome::NoLocal | Outcome::NotAllowed => "DROP".to_owned(),
        Outcome::NotService => "-".to_owned(),
        other => panic!("{src} to {to}: {other:?}"),
    }
}

/// What a socket of the node gets. It has no address yet that could stay.
fn called<F: HostFamily>(
    host: &Host<F>,
    to: SocketAddr,
    protocol: Protocol,
    cookie: u64,
) -> String {
    let mut call = Call::<F>::new(to, cookie);
    call.protocol = protocol.number();
    match send(&mut call, host, Act::Send) {
        Outcome::SocketTranslated => call.to().to_string(),
        Outcome::SocketRefused => "REJECT".to_owned(),
        Outcome::NotService => "-".to_owned(),
        other => panic!("{other:?}"),
    }
}
