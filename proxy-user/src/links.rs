//! The node's links by what they are: which are pods', which lead to other machines, and what has changed of that. No I/O:
//! [`crate::netlink`] brings the facts.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::IpAddr;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use crate::catch_all;
use crate::exits::{self, Exits, Own};
use crate::kernel::probe;

/// What links are for, where the operator says so.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Rule {
    /// The role.
    pub role: Role,
    /// Which links.
    pub links: Pattern,
}

/// Some of a node's links.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Pattern {
    /// The one of that name.
    Name(String),
    /// Those whose names begin so.
    Prefix(String),
    /// The ports of the bridge of that name.
    PortsOf(String),
}

/// What a link is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Role {
    /// The host side of a pod's link: its client's packets are translated here.
    Pod,
    /// Leads to other machines.
    Uplink,
    /// Leads to other machines, and has no Ethernet headers (wireguard, ipip, tun).
    Tunnel,
    /// Leads to other machines, but lies on an uplink (macvlan, ipvlan): what comes in by it has come in there.
    Child,
    /// [`crate::catch_all`]: what is routed to it is caught there.
    CatchAll,
    /// Not to be touched.
    Ignore,
}

impl Role {
    /// Whether it leads to other machines.
    pub const fn is_uplink(self) -> bool {
        matches!(self, Self::Uplink | Self::Tunnel | Self::Child)
    }

    /// The role in words.
    pub const fn label(self) -> &'static str {
        match self {
            Self::Pod => "pod link",
            Self::Uplink => "uplink",
            Self::Tunnel => "tunnel",
            Self::Child => "uplink on an uplink",
            Self::CatchAll => "catch-all link",
            Self::Ignore => "link",
        }
    }
}

impl std::str::FromStr for Rule {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (role, pattern) =
            text.split_once('=').ok_or("expected ROLE=PATTERN, as in pod=cali*")?;
        let role = match role {
            "pod" => Role::Pod,
            "uplink" => Role::Uplink,
            "ignore" => Role::Ignore,
            other => return Err(format!("role \"{other}\" is not one of pod, uplink and ignore")),
        };
        let links = match pattern.strip_suffix('*') {
            Some(prefix) => Pattern::Prefix(prefix.to_owned()),
            None => Pattern::Name(pattern.to_owned()),
        };
        Ok(Self { role, links })
    }
}

impl std::fmt::Display for Rule {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let role = match self.role {
            Role::Pod => "pod",
            Role::Uplink | Role::Tunnel | Role::Child => "uplink",
            // No rule makes a catch-all link.
            Role::Ignore | Role::CatchAll => "ignore",
        };
        write!(f, "{role}={}", self.links)
    }
}

impl std::fmt::Display for Pattern {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Name(name) => f.write_str(name),
            Self::Prefix(prefix) => write!(f, "{prefix}*"),
            Self::PortsOf(bridge) => write!(f, "the ports of {bridge}"),
        }
    }
}

impl Pattern {
    fn matches(&self, link: &Link, controller: Option<&str>) -> bool {
        match self {
            Self::Name(name) => link.name == *name,
            Self::Prefix(prefix) => link.name.starts_with(prefix),
            Self::PortsOf(bridge) => controller == Some(bridge),
        }
    }
}

/// What a link's packets begin with.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub enum Header {
    /// An Ethernet header.
    #[default]
    Ethernet,
    /// Their IP header.
    None,
    /// As [`Header::None`] from Linux 5.14 on; before, what comes in begins with the outer headers.
    Encapsulated,
    /// Something that we can't read; or it is the loopback.
    Other,
}

/// What a link does with packets, as far as that decides what it is for.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub enum Kind {
    /// Sends them on and takes them in.
    #[default]
    Plain,
    /// One end of a veth or netkit pair whose other end is in another network namespace.
    Pair,
    /// A bridge: what comes in by its ports shows at it, if it is for the node.
    Bridge,
    /// A bond, a team or another switch: all that comes in by its ports shows at it or is its own business.
    Trunk,
    /// Nothing comes in by it: it holds addresses (dummy), or delays what came in elsewhere (ifb).
    Silent,
}

/// A link as netlink tells of it.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct Link {
    /// Its name.
    pub name: String,
    /// What it does with packets.
    pub kind: Kind,
    /// What its packets begin with.
    pub header: Header,
    /// Its addresses that others may reach, in the order in which they came.
    pub own: Vec<Own>,
    /// All its addresses but link-local ones.
    pub addresses: BTreeSet<IpAddr>,
    /// Whether a route to more than one machine has led out by it: a pod's link has routes to the pod alone. It counts
    /// after the route is gone too, as the kernel does not tell of each that goes.
    pub leads_on: bool,
    /// The bridge or bond that it is a port of.
    pub controller: Option<u32>,
    /// The link of this namespace by which comes in what comes in by it.
    pub lower: Option<u32>,
}

impl Link {
    /// Whether it has a subnet: an address with a prefix shorter than the address.
    fn has_subnet(&self) -> bool {
        self.own.iter().any(|own| own.net.prefix_len() < own.net.max_prefix_len())
    }

    /// The role, as far as this link's packets can be read.
    fn served(&self, role: Role) -> Role {
        match (self.header, role) {
            (Header::Ethernet, role) => role,
            (Header::None, Role::Uplink) => Role::Tunnel,
            (Header::Encapsulated, Role::Uplink) if probe::shows_inner_packets() => Role::Tunnel,
            _ => Role::Ignore,
        }
    }
}

/// What has changed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Change {
    /// A link to attach to. Told once for each link and role.
    Came {
        /// Its index.
        ifindex: u32,
        /// Its name.
        name: String,
        /// What it is for.
        role: Role,
    },
    /// A link is gone, or has another role.
    Went {
        /// Its index.
        ifindex: u32,
        /// Its last name.
        name: String,
    },
    /// All links that are there have been told of: these are to be attached to, and no others.
    Listed(HashSet<u32>),
    /// The node's addresses are these.
    Addresses(BTreeSet<IpAddr>),
    /// By these addresses the node masquerades what leaves by its uplinks.
    Exits(Exits),
    /// Other ways may lead to backends in these ranges.
    Routes(Vec<IpNet>),
}

/// All addresses.
pub fn everywhere() -> [IpNet; 2] {
    [IpNet::V4(Ipv4Net::default()), IpNet::V6(Ipv6Net::default())]
}

/// What was told of a link, and what it was then.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Told {
    name: String,
    role: Role,
    kind: Kind,
}

/// All links, and what was told of them.
#[derive(Default)]
pub struct Links {
    rules: Vec<Rule>,
    /// By index.
    pub known: HashMap<u32, Link>,
    /// Links that were told of.
    told: HashMap<u32, Told>,
    /// Those that were uplinks, while all is listed anew.
    uplinks: HashMap<u32, Told>,
    /// The addresses that were told of.
    addresses: BTreeSet<IpAddr>,
    exits: Exits,
}

impl Links {
    /// No links yet, for an operator's rules.
    pub fn new(rules: Vec<Rule>) -> Self {
        Self { rules, ..Self::default() }
    }

    /// Forgets what was told, so that all is told again: news may have been lost. What were uplinks is kept in mind until
    /// then.
    pub fn start_over(&mut self) {
        self.known.clear();
        self.uplinks.extend(self.told.drain().filter(|(_, told)| told.role.is_uplink()));
    }

    /// What a link is for: what the first rule says that is of it, or else what it looks like.
    pub fn role(&self, ifindex: u32) -> Role {
        let Some(link) = self.known.get(&ifindex) else { return Role::Ignore };
        if link.name == catch_all::NAME {
            return Role::CatchAll;
        }
        let ruled = self.rules_of(link).next().map(|rule| rule.role);
        let role = link.served(ruled.unwrap_or_else(|| self.looks_like(ifindex, link)));
        let lies_on = |lower: u32| lower != ifindex && self.role(lower).is_uplink();
        if role == Role::Uplink && link.lower.is_some_and(lies_on) { Role::Child } else { role }
    }

    /// A pod's link leads into another namespace, and at most has a gateway's address and routes to the pod. What connects
    /// machines has, or had, a subnet or routes to more than one of them: a node that is itself a container is reached by such a
    /// pair too. Once it was an uplink it stays one, whatever addresses come and go; but a pair whose other end has been here until
    /// then is new. Ports belong to their bridge or bond,
    /// and a bridge whose ports are all pods' is left to those.
    fn looks_like(&self, ifindex: u32, link: &Link) -> Role {
        let told = self.told.get(&ifindex);
        let before = self.uplinks.get(&ifindex).filter(|before| before.name == link.name);
        let was_uplink =
            told.or(before).is_some_and(|told| told.role.is_uplink() && told.kind == link.kind);
        let connects = link.has_subnet() || link.leads_on || was_uplink;
        if link.kind == Kind::Pair && !connects {
            return Role::Pod;
        }
        let controller = link.controller.and_then(|index| self.known.get(&index));
        let is_port = controller.is_some_and(|c| matches!(c.kind, Kind::Bridge | Kind::Trunk));
        if is_port || link.kind == Kind::Silent || self.is_bridge_of_pods(ifindex, link) {
            return Role::Ignore;
        }
        if connects || !link.addresses.is_empty() { Role::Uplink } else { Role::Ignore }
    }

    /// Whether a link is a bridge with pods, and with nothing but pods and what is not to be touched.
    fn is_bridge_of_pods(&self, ifindex: u32, link: &Link) -> bool {
        let ports = self.known.iter().filter(|(_, port)| port.controller == Some(ifindex));
        let is_ignored =
            |port: &Link| self.rules_of(port).next().is_some_and(|rule| rule.role == Role::Ignore);
        let mut ports = ports.filter(|(_, port)| !is_ignored(port)).peekable();
        link.kind == Kind::Bridge
            && ports.peek().is_some()
            && ports.all(|(index, _)| self.role(*index) == Role::Pod)
    }

    /// The rules that are of a link; the first counts.
    fn rules_of<'a>(&'a self, link: &'a Link) -> impl Iterator<Item = &'a Rule> {
        let controller = link.controller.and_then(|index| self.known.get(&index));
        let controller = controller.map(|controller| controller.name.as_str());
        self.rules.iter().filter(move |rule| rule.links.matches(link, controller))
    }

    /// What an operator should know of the rules, by the names of the links: it is served as far as can be.
    pub fn doubts(&self) -> Vec<String> {
        let mut doubts = Vec::new();
        for rule in &self.rules {
            let is_of = |link: &Link| self.rules_of(link).any(|other| other == rule);
            if !matches!(rule.links, Pattern::PortsOf(_)) && !self.known.values().any(is_of) {
                doubts.push(format!(
                    "--interfaces={rule} is of no link of this node; it counts for one that comes later"
                ));
            }
        }
        for link in self.known.values() {
            let mut roles = self.rules_of(link).map(|rule| rule.role);
            let Some(first) = roles.next() else { continue };
            if roles.any(|other| other != first) {
                doubts.push(format!(
                    "--interfaces gives link {} two roles; the first counts: {}",
                    link.name,
                    first.label()
                ));
            }
            if link.served(first) != first && !(first.is_uplink() && link.served(first).is_uplink())
            {
                doubts.push(format!(
                    "link {} can't be served as {}, as --interfaces says: its packets have no Ethernet headers",
                    link.name,
                    first.label()
                ));
            }
            if first == Role::Uplink && !link.leads_on && !link.has_subnet() {
                doubts.push(format!(
                    "link {} is an uplink by --interfaces, but no route leads out by it: what comes in is served, and \
                     answered by the ways that there are",
                    link.name
                ));
            }
        }
        doubts
    }

    /// All that there is, when it is told for the first time or anew.
    pub fn all(&mut self) -> Vec<Change> {
        let mut changes = self.changes();
        self.uplinks.clear();
        changes.push(Change::Listed(self.told.keys().copied().collect()));
        changes
    }

    /// What has changed since the last call.
    pub fn changes(&mut self) -> Vec<Change> {
        let mut changes = Vec::new();
        let wanted = self.wanted();
        for (ifindex, Told { name, role, .. }) in &self.told {
            if wanted.get(ifindex).is_none_or(|wanted| wanted.role != *role) {
                changes.push(Change::Went { ifindex: *ifindex, name: name.clone() });
            }
        }
        for (ifindex, Told { name, role, .. }) in &wanted {
            if self.told.get(ifindex).is_none_or(|told| told.role != *role) {
                let (ifindex, name, role) = (*ifindex, name.clone(), *role);
                changes.push(Change::Came { ifindex, name, role });
            }
        }
        self.told = wanted;
        let exits = self.exits();
        if exits != self.exits {
            self.exits.clone_from(&exits);
            changes.push(Change::Exits(exits));
        }
        let addresses: BTreeSet<IpAddr> =
            self.known.values().flat_map(|link| link.addresses.iter().copied()).collect();
        if addresses != self.addresses {
            self.addresses.clone_from(&addresses);
            changes.push(Change::Addresses(addresses));
        }
        changes
    }

    fn exits(&self) -> Exits {
        let in_order: BTreeMap<u32, &Link> =
            self.known.iter().map(|(ifindex, link)| (*ifindex, link)).collect();
        let others = in_order.values().flat_map(|link| link.own.iter().map(|own| own.net.addr()));
        let others: Vec<IpAddr> = others.collect();
        let told = self.told.iter().filter(|(_, told)| told.role.is_uplink());
        let of_link = |ifindex: &u32| {
            Some((*ifindex, exits::of_link(&self.known.get(ifindex)?.own, &others)))
        };
        told.filter_map(|(ifindex, _)| of_link(ifindex)).collect()
    }

    /// The links to attach to.
    fn wanted(&self) -> HashMap<u32, Told> {
        let told = self.known.iter().map(|(ifindex, link)| {
            let (name, role, kind) = (link.name.clone(), self.role(*ifindex), link.kind);
            (*ifindex, Told { name, role, kind })
        });
        told.filter(|(_, told)| told.role != Role::Ignore).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    /// A link of some kind, with a gateway's address, or a subnet, or neither.
    fn link(name: &str, kind: Kind, text: &str) -> Link {
        let mut link = Link { name: name.to_owned(), kind, ..Link::default() };
        if let Some((ip, _)) = text.split_once('/') {
            link.own.push(Own { net: text.parse().unwrap(), is_last: false });
            link.addresses.insert(address(ip));
        } else if !text.is_empty() {
            link.addresses.insert(address(text));
        }
        link
    }

    fn port_of(controller: u32, link: Link) -> Link {
        Link { controller: Some(controller), ..link }
    }

    fn leading_on(link: Link) -> Link {
        Link { leads_on: true, ..link }
    }

    fn node(rules: &[&str], all: &[(u32, Link)]) -> Links {
        let rules = rules.iter().map(|rule| rule.parse().unwrap()).collect();
        Links { known: all.iter().cloned().collect(), ..Links::new(rules) }
    }

    use Kind::{Bridge, Pair, Plain, Silent, Trunk};
    use Role::{Ignore, Pod, Uplink};

    /// A kind of node: its links, and what each is for.
    type Row = (&'static str, Vec<(u32, Link)>, &'static [Role]);

    fn nic() -> Link {
        link("eth0", Plain, "192.0.2.1/24")
    }

    fn pod() -> Link {
        link("veth1", Pair, "")
    }

    fn plain_nodes() -> Vec<Row> {
        vec![
            ("plain, routed pods", vec![(1, nic()), (2, pod())], &[Uplink, Pod]),
            (
                "a pod's link with a gateway's address",
                vec![(1, nic()), (2, link("cali1", Pair, "169.254.1.1"))],
                &[Uplink, Pod],
            ),
            (
                "pods in a bridge",
                vec![(1, nic()), (2, link("cni0", Bridge, "10.0.0.1/24")), (3, port_of(2, pod()))],
                &[Uplink, Ignore, Pod],
            ),
            (
                "a bridge that waits for its first pod",
                vec![(1, nic()), (2, link("cni0", Bridge, "10.0.0.1/24"))],
                &[Uplink, Uplink],
            ),
            (
                "the NIC in a bridge",
                vec![
                    (1, port_of(2, link("eth0", Plain, ""))),
                    (2, link("br0", Bridge, "192.0.2.1/24")),
                ],
                &[Ignore, Uplink],
            ),
            (
                "the NIC in a bridge with a container that is no pod, or with a VM of the cluster",
                vec![
                    (1, port_of(2, link("eth0", Plain, ""))),
                    (2, link("br0", Bridge, "192.0.2.1/24")),
                    (3, port_of(2, pod())),
                ],
                &[Ignore, Uplink, Pod],
            ),
            (
                "unnumbered: the node's address on lo, or on a dummy link",
                vec![
                    (1, leading_on(link("eth0", Plain, ""))),
                    (2, link("loop1", Silent, "192.0.2.1")),
                    (3, pod()),
                ],
                &[Uplink, Ignore, Pod],
            ),
            (
                "a second NIC that only routes use, and one that nothing uses",
                vec![
                    (1, nic()),
                    (2, leading_on(link("eth1", Plain, ""))),
                    (3, link("eth2", Plain, "")),
                ],
                &[Uplink, Uplink, Ignore],
            ),
        ]
    }

    fn stacked_nodes() -> Vec<Row> {
        vec![
            (
                "a bond, and a VLAN on it",
                vec![
                    (1, port_of(2, link("eth0", Plain, ""))),
                    (2, link("bond0", Trunk, "")),
                    (3, link("bond0.7", Plain, "192.0.2.1/24")),
                ],
                &[Ignore, Ignore, Uplink],
            ),
            (
                "a NIC in a VRF",
                vec![(1, port_of(2, nic())), (2, link("vrf0", Plain, ""))],
                &[Uplink, Ignore],
            ),
            (
                "an overlay: vxlan with a single address",
                vec![(1, nic()), (2, link("flannel.1", Plain, "10.0.1.0")), (3, pod())],
                &[Uplink, Uplink, Pod],
            ),
            (
                "a macvlan child of the NIC, by which the node reaches pods that are such children",
                vec![(1, nic()), (2, Link { lower: Some(1), ..link("shim", Plain, "192.0.2.9") })],
                &[Uplink, Role::Child],
            ),
            (
                "a node that is itself a container",
                vec![(1, link("eth0", Pair, "172.18.0.2/16")), (2, pod())],
                &[Uplink, Pod],
            ),
            (
                "the same, unnumbered",
                vec![(1, leading_on(link("eth0", Pair, ""))), (2, pod())],
                &[Uplink, Pod],
            ),
            (
                "addresses of Services on a dummy link (IPVS, NodeLocal DNSCache)",
                vec![(1, nic()), (2, link("kube-ipvs0", Silent, "10.96.0.1"))],
                &[Uplink, Ignore],
            ),
            (
                "a port of a switch that hides its traffic (Open vSwitch)",
                vec![
                    (1, port_of(3, link("eth0", Plain, ""))),
                    (2, link("br-ex", Plain, "192.0.2.1/24")),
                    (3, link("ovs-system", Trunk, "")),
                ],
                &[Ignore, Uplink, Ignore],
            ),
        ]
    }

    #[test]
    fn links_are_known_by_what_they_are() {
        for (world, links, roles) in plain_nodes().into_iter().chain(stacked_nodes()) {
            let links = node(&[], &links);
            let seen: Vec<Role> = (1..).take(roles.len()).map(|index| links.role(index)).collect();
            assert_eq!(seen, roles, "{world}");
        }
    }

    #[test]
    fn an_uplink_stays_one_while_its_address_is_away() {
        for kind in [Plain, Pair] {
            let mut links = node(&[], &[(1, link("eth0", kind, "192.0.2.1/24"))]);
            let came = Change::Came { ifindex: 1, name: "eth0".to_owned(), role: Uplink };
            assert!(links.changes().contains(&came));
            links.known.insert(1, link("eth0", kind, ""));
            let is_of_link =
                |change: &Change| matches!(change, Change::Came { .. } | Change::Went { .. });
            assert!(!links.changes().iter().any(is_of_link), "{kind:?}");
            links.known.insert(1, link("lan0", kind, "192.0.2.1/24"));
            assert!(!links.changes().iter().any(is_of_link), "{kind:?} renamed");
            links.known.remove(&1);
            assert!(
                links.changes().contains(&Change::Went { ifindex: 1, name: "lan0".to_owned() })
            );
        }
    }

    /// A CNI makes both ends of a pod's link here, and moves one: until then it has no end elsewhere.
    #[test]
    fn a_pods_link_is_one_as_soon_as_its_other_end_is_elsewhere() {
        let mut links = node(&[], &[(1, link("cali1", Plain, "169.254.1.1"))]);
        links.changes();
        links.known.insert(1, link("cali1", Pair, "169.254.1.1"));
        let came = Change::Came { ifindex: 1, name: "cali1".to_owned(), role: Pod };
        assert!(links.changes().contains(&came));
        links.start_over();
        links.known.insert(1, link("cali1", Pair, "169.254.1.1"));
        assert!(links.all().contains(&came));
    }

    #[test]
    fn after_lost_news_everything_is_told_again() {
        let nic = || (1, link("eth0", Plain, "192.0.2.1/24"));
        let mut links = node(&[], &[nic()]);
        links.changes();
        links.start_over();
        links.known.extend([nic()]);
        let came = Change::Came { ifindex: 1, name: "eth0".to_owned(), role: Uplink };
        assert_eq!(links.all(), [came.clone(), Change::Listed([1].into())]);
        // It was an uplink, though its address is away now; another link of that index was not.
        links.start_over();
        links.known.insert(1, link("eth0", Plain, ""));
        assert!(links.all().contains(&came));
        links.start_over();
        links.known.insert(1, link("eth7", Plain, ""));
        assert_eq!(links.all().last(), Some(&Change::Listed(HashSet::new())));
    }

    #[test]
    fn a_link_without_ethernet_headers_may_be_an_uplink_and_nothing_else() {
        let role = |header, rules: &[&str]| {
            let plain = link("tun0", Plain, "192.0.2.1/24");
            node(rules, &[(1, Link { header, ..plain })]).role(1)
        };
        assert_eq!(role(Header::Ethernet, &[]), Uplink);
        assert_eq!(role(Header::None, &[]), Role::Tunnel);
        assert_eq!(role(Header::Other, &[]), Ignore);
        assert_eq!(role(Header::None, &["pod=*"]), Ignore);
    }

    #[test]
    fn the_operators_rules_count_the_first_before_all_others() {
        let rules = ["ignore=veth9", "pod=veth*", "uplink=br0", "uplink=cni0"];
        let bridge = |name| link(name, Bridge, "192.0.2.1/24");
        let links = node(
            &rules,
            &[
                (1, link("veth9", Pair, "")),
                (2, link("veth1", Plain, "")),
                (3, bridge("br0")),
                (4, port_of(3, link("veth2", Pair, ""))),
            ],
        );
        assert_eq!([1, 2, 3, 4].map(|index| links.role(index)), [Ignore, Pod, Uplink, Pod]);
        assert!("pods=x".parse::<Rule>().is_err());
        let doubts = links.doubts();
        let says = |text: &str| doubts.iter().any(|doubt| doubt.contains(text));
        assert!(says("gives link veth9 two roles"), "{doubts:?}");
        assert!(says("--interfaces=uplink=cni0 is of no link"), "{doubts:?}");
        assert_eq!(doubts.len(), 2, "{doubts:?}");
    }

    #[test]
    fn kp_86_a_bridges_ports_are_pods_links_if_that_is_said() {
        let rules = vec![Rule { role: Pod, links: Pattern::PortsOf("br0".to_owned()) }];
        let tap = |controller| Link { controller, ..link("tap0", Plain, "") };
        let mut links = Links::new(rules);
        links.known.extend([(1, link("br0", Bridge, "")), (2, link("br1", Bridge, ""))]);
        for (controller, role) in [(Some(1), Pod), (Some(2), Ignore), (None, Ignore)] {
            links.known.insert(3, tap(controller));
            assert_eq!(links.role(3), role, "{controller:?}");
        }
    }
}
