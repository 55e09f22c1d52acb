//! The node's network links, followed by netlink: which are pods' and which lead to other machines, and
//! when they come and go; the node's addresses; and that routes have changed.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::IpAddr;

use anyhow::{Context, Result};
use futures::{StreamExt, TryStreamExt};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use rtnetlink::packet_core::{NetlinkMessage, NetlinkPayload};
use rtnetlink::packet_route::address::{AddressAttribute, AddressMessage, AddressScope};
use rtnetlink::packet_route::link::{
    InfoKind, LinkAttribute, LinkInfo, LinkLayerType, LinkMessage,
};
use rtnetlink::packet_route::route::{RouteAddress, RouteAttribute, RouteMessage};
use rtnetlink::packet_route::{AddressFamily, RouteNetlinkMessage};
use rtnetlink::{Handle, MulticastGroup, new_multicast_connection};
use tokio::sync::mpsc;

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
    /// Not to be touched.
    Ignore,
}

impl Role {
    /// Whether it leads to other machines.
    pub const fn is_uplink(self) -> bool {
        matches!(self, Self::Uplink | Self::Tunnel)
    }

    /// The role in words.
    pub const fn label(self) -> &'static str {
        match self {
            Self::Pod => "pod link",
            Self::Uplink => "uplink",
            Self::Tunnel => "tunnel",
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

impl Header {
    const fn of(kind: LinkLayerType) -> Self {
        match kind {
            LinkLayerType::Ether => Self::Ethernet,
            LinkLayerType::None | LinkLayerType::Rawip => Self::None,
            LinkLayerType::Tunnel
            | LinkLayerType::Tunnel6
            | LinkLayerType::Sit
            | LinkLayerType::Ipgre
            | LinkLayerType::Ip6gre => Self::Encapsulated,
            _ => Self::Other,
        }
    }
}

/// A link as netlink tells of it.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct Link {
    /// Its name.
    pub name: String,
    /// What its packets begin with.
    pub header: Header,
    /// It is a veth or netkit pair whose other end is in another network namespace.
    pub leads_into_namespace: bool,
    /// Its own subnets: an address with a prefix shorter than the address.
    pub subnets: Vec<IpAddr>,
    /// All its addresses but link-local ones.
    pub addresses: BTreeSet<IpAddr>,
    /// The bridge or bond that it is a port of.
    pub controller: Option<u32>,
}

impl Link {
    /// What the link is for: what the first matching rule says, or else what it looks like. A pod's
    /// link leads into another namespace and is at most given an address of its own, as a gateway;
    /// a subnet on it means that it connects machines (a node that is itself a container). Any other
    /// link with an address is an uplink: packets from elsewhere may come in by it. `controller` is the
    /// name of the bridge or bond that it is a port of.
    pub fn role(&self, rules: &[Rule], controller: Option<&str>) -> Role {
        if let Some(rule) = rules.iter().find(|rule| rule.links.matches(self, controller)) {
            return rule.role;
        }
        if self.leads_into_namespace && self.subnets.is_empty() {
            return Role::Pod;
        }
        if self.addresses.is_empty() { Role::Ignore } else { Role::Uplink }
    }

    /// By which address pods leave the cluster here: the first of each family, in its subnet if it has
    /// one.
    fn exits(&self) -> [Option<IpAddr>; 2] {
        let first = |is_family: fn(&IpAddr) -> bool| {
            self.subnets.iter().chain(&self.addresses).copied().find(is_family)
        };
        [first(IpAddr::is_ipv4), first(IpAddr::is_ipv6)]
    }

    /// What the link is for, and how it can serve that.
    fn served_role(&self, rules: &[Rule], controller: Option<&str>) -> Role {
        match (self.header, self.role(rules, controller)) {
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
    /// All links that were there at the start have been told of.
    Listed,
    /// The node's addresses are these.
    Addresses(BTreeSet<IpAddr>),
    /// The node's addresses on its uplinks, by link: the first of IPv4 and of IPv6.
    Exits(Exits),
    /// Other ways may lead to backends in these ranges.
    Routes(Vec<IpNet>),
}

/// All addresses.
pub fn everywhere() -> [IpNet; 2] {
    [IpNet::V4(Ipv4Net::default()), IpNet::V6(Ipv6Net::default())]
}

/// The addresses by which pods leave the cluster, by link: of IPv4 and of IPv6.
pub type Exits = BTreeMap<u32, [Option<IpAddr>; 2]>;

/// Tells of links, addresses and routes, first of all that are there, then of each change.
///
/// # Errors
/// If netlink can't be used.
pub async fn follow(rules: Vec<Rule>, changes: mpsc::Sender<Change>) -> Result<()> {
    let groups = [
        MulticastGroup::Link,
        MulticastGroup::Ipv4Ifaddr,
        MulticastGroup::Ipv6Ifaddr,
        MulticastGroup::Ipv4Route,
        MulticastGroup::Ipv6Route,
    ];
    let (connection, handle, mut messages) =
        new_multicast_connection(&groups).context("cannot follow the network links by netlink")?;
    let connection = tokio::spawn(connection);
    let mut links = Links { rules, ..Links::default() };
    list(&handle, &mut links).await.context("cannot list the network links")?;
    for change in links.changes() {
        let _ = changes.send(change).await;
    }
    let _ = changes.send(Change::Listed).await;
    while let Some((message, _)) = messages.next().await {
        let mut moved = moved(&message);
        if links.changes_uplink(&message) {
            moved.extend(everywhere());
        }
        if lost_messages(&message) {
            links.known.clear();
            list(&handle, &mut links).await.context("cannot list the network links")?;
        } else {
            links.hear(message);
        }
        for change in
            links.changes().into_iter().chain((!moved.is_empty()).then_some(Change::Routes(moved)))
        {
            if changes.send(change).await.is_err() {
                connection.abort();
                return Ok(());
            }
        }
    }
    anyhow::bail!("netlink has gone silent")
}

/// The socket's buffer ran over: what we know may be wrong.
fn lost_messages(message: &NetlinkMessage<RouteNetlinkMessage>) -> bool {
    matches!(message.payload, NetlinkPayload::Overrun(_))
}

/// Where other ways may lead to backends after this message.
fn moved(message: &NetlinkMessage<RouteNetlinkMessage>) -> Vec<IpNet> {
    match &message.payload {
        NetlinkPayload::Overrun(_) => everywhere().into(),
        NetlinkPayload::InnerMessage(
            RouteNetlinkMessage::NewRoute(route) | RouteNetlinkMessage::DelRoute(route),
        ) => vec![destination(route)],
        _ => Vec::new(),
    }
}

/// Where a route leads.
fn destination(route: &RouteMessage) -> IpNet {
    let to = route.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Destination(RouteAddress::Inet(to)) => Some(IpAddr::V4(*to)),
        RouteAttribute::Destination(RouteAddress::Inet6(to)) => Some(IpAddr::V6(*to)),
        _ => None,
    });
    let range = to.and_then(|to| IpNet::new(to, route.header.destination_prefix_length).ok());
    let [v4, v6] = everywhere();
    // A default route has no destination.
    let default = if route.header.address_family == AddressFamily::Inet6 { v6 } else { v4 };
    range.unwrap_or(default)
}

async fn list(handle: &Handle, links: &mut Links) -> Result<()> {
    let mut all = handle.link().get().execute();
    while let Some(message) = all.try_next().await? {
        links.set(&message);
    }
    let mut all = handle.address().get().execute();
    while let Some(message) = all.try_next().await? {
        links.set_address(&message, true);
    }
    Ok(())
}

#[derive(Default)]
struct Links {
    rules: Vec<Rule>,
    known: HashMap<u32, Link>,
    /// Links that were told of, with their names and roles.
    told: HashMap<u32, (String, Role)>,
    /// The addresses that were told of.
    addresses: BTreeSet<IpAddr>,
    exits: Exits,
}

impl Links {
    fn hear(&mut self, message: NetlinkMessage<RouteNetlinkMessage>) {
        let NetlinkPayload::InnerMessage(message) = message.payload else { return };
        match message {
            // A bridge tells of its ports by messages of another family, without what we ask for; one
            // that a port has left its bridge is no news that it is gone.
            RouteNetlinkMessage::NewLink(link) | RouteNetlinkMessage::DelLink(link)
                if link.header.interface_family != AddressFamily::Unspec => {}
            RouteNetlinkMessage::NewLink(link) => self.set(&link),
            RouteNetlinkMessage::DelLink(link) => {
                self.known.remove(&link.header.index);
            }
            RouteNetlinkMessage::NewAddress(address) => self.set_address(&address, true),
            RouteNetlinkMessage::DelAddress(address) => self.set_address(&address, false),
            _ => {}
        }
    }

    /// Whether a message is of an uplink, by which ways may lead: a link that goes down takes IPv4
    /// routes along without a word.
    fn changes_uplink(&self, message: &NetlinkMessage<RouteNetlinkMessage>) -> bool {
        let NetlinkPayload::InnerMessage(
            RouteNetlinkMessage::NewLink(link) | RouteNetlinkMessage::DelLink(link),
        ) = &message.payload
        else {
            return false;
        };
        let known = self.known.get(&link.header.index);
        link.header.interface_family == AddressFamily::Unspec
            && known.is_some_and(|known| self.role(known).is_uplink())
    }

    fn set(&mut self, message: &LinkMessage) {
        let link = self.known.entry(message.header.index).or_default();
        link.header = Header::of(message.header.link_layer_type);
        let (mut is_pair, mut elsewhere) = (false, false);
        link.controller = None;
        for attribute in &message.attributes {
            match attribute {
                LinkAttribute::IfName(name) => link.name.clone_from(name),
                LinkAttribute::LinkNetNsId(_) => elsewhere = true,
                LinkAttribute::Controller(index) => link.controller = Some(*index),
                LinkAttribute::LinkInfo(infos) => is_pair = infos.iter().any(is_pair_kind),
                _ => {}
            }
        }
        link.leads_into_namespace = is_pair && elsewhere;
    }

    fn set_address(&mut self, message: &AddressMessage, present: bool) {
        let header = &message.header;
        let Some(link) = self.known.get_mut(&header.index) else { return };
        let Some(address) = own_address(message) else { return };
        if header.scope != AddressScope::Link {
            link.addresses.remove(&address);
            if present {
                link.addresses.insert(address);
            }
        }
        let bits = if address.is_ipv4() { 32 } else { 128 };
        let has_subnet =
            present && header.scope == AddressScope::Universe && header.prefix_len != bits;
        // One that is only renewed keeps its place: the first is the one that pods leave by.
        if !has_subnet {
            link.subnets.retain(|known| *known != address);
        } else if !link.subnets.contains(&address) {
            link.subnets.push(address);
        }
    }

    /// What has changed since the last call.
    fn changes(&mut self) -> Vec<Change> {
        let mut changes = Vec::new();
        let wanted = self.wanted();
        for (ifindex, (name, role)) in &self.told {
            if wanted.get(ifindex).is_none_or(|(_, wanted)| wanted != role) {
                changes.push(Change::Went { ifindex: *ifindex, name: name.clone() });
            }
        }
        for (ifindex, (name, role)) in &wanted {
            if self.told.get(ifindex).is_none_or(|(_, told)| told != role) {
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

    fn role(&self, link: &Link) -> Role {
        let controller = link.controller.and_then(|index| self.known.get(&index));
        link.served_role(&self.rules, controller.map(|controller| controller.name.as_str()))
    }

    fn exits(&self) -> Exits {
        let told = self.told.iter().filter(|(_, (_, role))| role.is_uplink());
        told.filter_map(|(ifindex, _)| Some((*ifindex, self.known.get(ifindex)?.exits()))).collect()
    }

    /// The links to attach to. A bridge of pods is none: its ports are.
    fn wanted(&self) -> HashMap<u32, (String, Role)> {
        let pods = self.known.values().filter(|link| self.role(link) == Role::Pod);
        let bridges: HashSet<u32> = pods.filter_map(|link| link.controller).collect();
        let links = self
            .known
            .iter()
            .map(|(ifindex, link)| (*ifindex, (link.name.clone(), self.role(link))));
        links
            .filter(|(ifindex, (_, role))| match role {
                Role::Pod => true,
                Role::Ignore => false,
                _ => !bridges.contains(ifindex),
            })
            .collect()
    }
}

/// The node's own address. On a link to a single peer the other attribute is the peer's.
fn own_address(message: &AddressMessage) -> Option<IpAddr> {
    let attributes = || message.attributes.iter();
    let local = attributes().find_map(|attribute| match attribute {
        AddressAttribute::Local(address) => Some(*address),
        _ => None,
    });
    local.or_else(|| {
        attributes().find_map(|attribute| match attribute {
            AddressAttribute::Address(address) => Some(*address),
            _ => None,
        })
    })
}

fn is_pair_kind(info: &LinkInfo) -> bool {
    matches!(info, LinkInfo::Kind(InfoKind::Veth | InfoKind::Netkit))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn veth(name: &str) -> Link {
        Link { name: name.to_owned(), leads_into_namespace: true, ..Link::default() }
    }

    #[test]
    fn a_pair_into_another_namespace_is_a_pods_unless_it_has_a_subnet() {
        let subnets = vec!["192.0.2.1".parse().unwrap()];
        assert_eq!(veth("veth1").role(&[], None), Role::Pod);
        let addresses = subnets.iter().copied().collect();
        assert_eq!(Link { subnets, addresses, ..veth("eth0") }.role(&[], None), Role::Uplink);
        assert_eq!(Link { name: "lo".to_owned(), ..Link::default() }.role(&[], None), Role::Ignore);
    }

    #[test]
    fn a_link_without_ethernet_headers_may_be_an_uplink_and_nothing_else() {
        let addresses: BTreeSet<IpAddr> = ["192.0.2.1".parse().unwrap()].into();
        let link = |header| Link { header, addresses: addresses.clone(), ..Link::default() };
        let role = |kind| link(Header::of(kind)).served_role(&[], None);
        assert_eq!(role(LinkLayerType::Ether), Role::Uplink);
        assert_eq!(role(LinkLayerType::None), Role::Tunnel);
        assert_eq!(role(LinkLayerType::Loopback), Role::Ignore);
        let rules = ["pod=*".parse().unwrap()];
        assert_eq!(link(Header::None).served_role(&rules, None), Role::Ignore);
    }

    #[test]
    fn the_first_matching_rule_decides() {
        let rules: Vec<Rule> =
            ["ignore=veth9", "pod=veth*"].iter().map(|rule| rule.parse().unwrap()).collect();
        assert_eq!(veth("veth9").role(&rules, None), Role::Ignore);
        assert_eq!(
            Link { leads_into_namespace: false, ..veth("veth1") }.role(&rules, None),
            Role::Pod
        );
        assert!("pods=x".parse::<Rule>().is_err());
    }

    #[test]
    fn kp_86_a_bridges_ports_are_pods_links_if_that_is_said() {
        let rules = [Rule { role: Role::Pod, links: Pattern::PortsOf("br0".to_owned()) }];
        let tap = Link { name: "tap0".to_owned(), ..Link::default() };
        assert_eq!(tap.role(&rules, Some("br0")), Role::Pod);
        assert_eq!(tap.role(&rules, Some("br1")), Role::Ignore);
        assert_eq!(tap.role(&rules, None), Role::Ignore);
    }
}
