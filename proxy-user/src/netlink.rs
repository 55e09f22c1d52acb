//! The node's network links, followed by netlink: what [`crate::links`] goes by, and that routes have changed.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::{Context, Result};
use futures::channel::mpsc::UnboundedReceiver;
use futures::{FutureExt, StreamExt, TryStreamExt};
use ipnet::IpNet;
use nix::sys::socket::setsockopt;
use nix::sys::socket::sockopt::RcvBufForce;
use rtnetlink::packet_core::{NetlinkMessage, NetlinkPayload};
use rtnetlink::packet_route::address::{
    AddressAttribute, AddressHeader, AddressHeaderFlags, AddressMessage, AddressScope,
};
use rtnetlink::packet_route::link::{
    InfoKind, LinkAttribute, LinkInfo, LinkLayerType, LinkMessage,
};
use rtnetlink::packet_route::route::{RouteAddress, RouteAttribute, RouteMessage, RouteType};
use rtnetlink::packet_route::{AddressFamily, RouteNetlinkMessage};
use rtnetlink::sys::{AsyncSocket, SocketAddr};
use rtnetlink::{
    Handle, MulticastGroup, RouteMessageBuilder, new_connection, new_multicast_connection,
};
use tokio::sync::mpsc;

use crate::catch_all;
use crate::exits::Own;
use crate::links::{Change, Header, Kind, Links, Rule, everywhere};

/// How many bytes of news may wait. What is lost when there are more is listed anew.
const BUFFER: usize = 4 << 20;

/// The index of every namespace's loopback.
const LOOPBACK: u32 = 1;

/// What netlink tells of its own accord.
type Messages = UnboundedReceiver<(NetlinkMessage<RouteNetlinkMessage>, SocketAddr)>;

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
        MulticastGroup::Ipv4Rule,
        MulticastGroup::Ipv6Rule,
    ];
    let (mut connection, handle, mut messages) =
        new_multicast_connection(&groups).context("cannot follow the network links by netlink")?;
    // Fifty pods that start at once are a thousand messages. Without CAP_NET_ADMIN it stays as it is.
    let _ = setsockopt(connection.socket_mut().socket_ref(), RcvBufForce, &BUFFER);
    let connection = tokio::spawn(connection);
    // News carry the number of the request that they come of, whoever made it: they could be taken for answers to ours.
    let (answers, questions, _) = new_connection()?;
    let answers = tokio::spawn(answers);
    let mut links = Links::new(rules);
    let mut said = BTreeSet::new();
    for change in list(&questions, &mut links).await? {
        let _ = changes.send(change).await;
    }
    say(&links, &mut said);
    while let Some((message, _)) = messages.next().await {
        let mut moved = moved(&message);
        if changes_uplink(&links, &message) {
            moved.extend(everywhere());
        }
        let mut told = if lost_messages(&message) {
            drain(&handle, &mut messages).await;
            links.start_over();
            list(&questions, &mut links).await?
        } else {
            hear(&mut links, message);
            links.changes()
        };
        if !told.is_empty() {
            say(&links, &mut said);
        }
        told.extend((!moved.is_empty()).then_some(Change::Routes(moved)));
        for change in told {
            if changes.send(change).await.is_err() {
                connection.abort();
                answers.abort();
                return Ok(());
            }
        }
    }
    anyhow::bail!("netlink has gone silent")
}

/// Drops what was in the socket's buffer when it ran over: what came behind it is lost, so that it would be older than a
/// listing. The answer to a question comes after all of it.
async fn drain(handle: &Handle, messages: &mut Messages) {
    const OFTEN: usize = 10;
    for _ in 0..OFTEN {
        let mut answer = handle.link().get().match_index(LOOPBACK).execute();
        // What looks like an answer and is none has come after much as well.
        let _ = answer.try_next().await;
        let mut has_run_over = false;
        while let Some(Some((message, _))) = messages.next().now_or_never() {
            has_run_over |= lost_messages(&message);
        }
        if !has_run_over {
            return;
        }
    }
}

/// The socket's buffer ran over: what we know may be wrong.
fn lost_messages(message: &NetlinkMessage<RouteNetlinkMessage>) -> bool {
    matches!(message.payload, NetlinkPayload::Overrun(_))
}

/// Where other ways may lead to backends after this message.
fn moved(message: &NetlinkMessage<RouteNetlinkMessage>) -> Vec<IpNet> {
    match &message.payload {
        NetlinkPayload::Overrun(_)
        | NetlinkPayload::InnerMessage(
            RouteNetlinkMessage::NewRule(_) | RouteNetlinkMessage::DelRule(_),
        ) => everywhere().into(),
        NetlinkPayload::InnerMessage(
            RouteNetlinkMessage::NewRoute(route) | RouteNetlinkMessage::DelRoute(route),
        ) if route.header.protocol != catch_all::PROTOCOL => vec![destination(route)],
        _ => Vec::new(),
    }
}

/// Where a route leads.
pub fn destination(route: &RouteMessage) -> IpNet {
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

/// Says what is doubtful of the operator's rules, once.
fn say(links: &Links, said: &mut BTreeSet<String>) {
    for doubt in links.doubts() {
        if !said.contains(&doubt) {
            tracing::warn!("{doubt}");
            said.insert(doubt);
        }
    }
}

/// Takes in all that is there, and says what of it is new.
async fn list(handle: &Handle, links: &mut Links) -> Result<Vec<Change>> {
    list_all(handle, links).await.context("cannot list the network links")?;
    Ok(links.all())
}

async fn list_all(handle: &Handle, links: &mut Links) -> Result<()> {
    let mut all = handle.link().get().execute();
    while let Some(message) = all.try_next().await? {
        set_link(links, &message);
    }
    let mut all = handle.address().get().execute();
    while let Some(message) = all.try_next().await? {
        set_address(links, &message, true);
    }
    let v4 = RouteMessageBuilder::<Ipv4Addr>::new().build();
    let v6 = RouteMessageBuilder::<Ipv6Addr>::new().build();
    for all_of_family in [v4, v6] {
        let mut all = handle.route().get(all_of_family).execute();
        while let Some(message) = all.try_next().await? {
            set_route(links, &message);
        }
    }
    Ok(())
}

fn hear(links: &mut Links, message: NetlinkMessage<RouteNetlinkMessage>) {
    let NetlinkPayload::InnerMessage(message) = message.payload else { return };
    match message {
        // A bridge tells of its ports by messages of another family, without what we ask for; one
        // that a port has left its bridge is no news that it is gone.
        RouteNetlinkMessage::NewLink(link) | RouteNetlinkMessage::DelLink(link)
            if link.header.interface_family != AddressFamily::Unspec => {}
        RouteNetlinkMessage::NewLink(link) => set_link(links, &link),
        RouteNetlinkMessage::DelLink(link) => {
            links.known.remove(&link.header.index);
        }
        RouteNetlinkMessage::NewAddress(address) => set_address(links, &address, true),
        RouteNetlinkMessage::DelAddress(address) => set_address(links, &address, false),
        RouteNetlinkMessage::NewRoute(route) => set_route(links, &route),
        _ => {}
    }
}

/// Whether a message is of an uplink, by which ways may lead: a link that goes down takes IPv4
/// routes along without a word.
fn changes_uplink(links: &Links, message: &NetlinkMessage<RouteNetlinkMessage>) -> bool {
    let NetlinkPayload::InnerMessage(
        RouteNetlinkMessage::NewLink(link) | RouteNetlinkMessage::DelLink(link),
    ) = &message.payload
    else {
        return false;
    };
    link.header.interface_family == AddressFamily::Unspec
        && links.role(link.header.index).is_uplink()
}

fn set_link(links: &mut Links, message: &LinkMessage) {
    let link = links.known.entry(message.header.index).or_default();
    link.header = header_of(message.header.link_layer_type);
    let (mut kind, mut elsewhere, mut lower) = (None, false, None);
    link.controller = None;
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name.clone_from(name),
            LinkAttribute::LinkNetNsId(_) => elsewhere = true,
            LinkAttribute::Link(index) => lower = Some(*index),
            LinkAttribute::Controller(index) => link.controller = Some(*index),
            LinkAttribute::LinkInfo(infos) => {
                kind = infos.iter().find_map(|info| match info {
                    LinkInfo::Kind(kind) => Some(kind),
                    _ => None,
                });
            }
            _ => {}
        }
    }
    let is_child = matches!(kind, Some(InfoKind::MacVlan | InfoKind::MacVtap | InfoKind::IpVlan));
    link.lower = lower.filter(|_| is_child && !elsewhere);
    link.kind = kind.map_or(Kind::Plain, |kind| kind_of(kind, elsewhere));
}

/// What a link does, by the name of its driver; `elsewhere` if its other end is in another network namespace.
fn kind_of(kind: &InfoKind, elsewhere: bool) -> Kind {
    match kind {
        InfoKind::Veth | InfoKind::Netkit if elsewhere => Kind::Pair,
        InfoKind::Bridge => Kind::Bridge,
        InfoKind::Bond | InfoKind::Team | InfoKind::Hsr => Kind::Trunk,
        InfoKind::Other(name) if name == "openvswitch" => Kind::Trunk,
        InfoKind::Dummy | InfoKind::Ifb | InfoKind::Nlmon => Kind::Silent,
        _ => Kind::Plain,
    }
}

const fn header_of(kind: LinkLayerType) -> Header {
    match kind {
        LinkLayerType::Ether => Header::Ethernet,
        LinkLayerType::None | LinkLayerType::Rawip => Header::None,
        LinkLayerType::Tunnel
        | LinkLayerType::Tunnel6
        | LinkLayerType::Sit
        | LinkLayerType::Ipgre
        | LinkLayerType::Ip6gre => Header::Encapsulated,
        _ => Header::Other,
    }
}

fn set_address(links: &mut Links, message: &AddressMessage, present: bool) {
    let header = &message.header;
    let Some(link) = links.known.get_mut(&header.index) else { return };
    let Some(address) = own_address(message) else { return };
    if header.scope != AddressScope::Link {
        link.addresses.remove(&address);
        if present {
            link.addresses.insert(address);
        }
    }
    // One that is only renewed keeps its place: the first is chosen before others.
    let place = link.own.iter().position(|own| own.net.addr() == address);
    let is_own = present && header.scope == AddressScope::Universe;
    match (own(header, address).filter(|_| is_own), place) {
        (Some(own), Some(place)) => link.own[place] = own,
        (Some(own), None) => link.own.push(own),
        (None, Some(place)) => drop(link.own.remove(place)),
        (None, None) => {}
    }
}

/// An address as others see it. Of IPv6's, one that is secondary was made for a while.
fn own(header: &AddressHeader, address: IpAddr) -> Option<Own> {
    let mut last = AddressHeaderFlags::Deprecated | AddressHeaderFlags::Tentative;
    if address.is_ipv6() {
        last |= AddressHeaderFlags::Secondary;
    }
    let net = IpNet::new(address, header.prefix_len).ok()?;
    Some(Own { net, is_last: header.flags.intersects(last) })
}

/// Notes by which links a route to more than one machine leads out.
fn set_route(links: &mut Links, message: &RouteMessage) {
    let to = destination(message);
    let every_link_has = match to.addr() {
        IpAddr::V4(to) => to.is_link_local() || to.is_multicast() || to.is_broadcast(),
        IpAddr::V6(to) => to.is_unicast_link_local() || to.is_multicast(),
    };
    if message.header.kind != RouteType::Unicast
        || every_link_has
        || to.prefix_len() == to.max_prefix_len()
    {
        return;
    }
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Oif(index) => leads_on(links, *index),
            RouteAttribute::MultiPath(hops) => {
                hops.iter().for_each(|hop| leads_on(links, hop.interface_index));
            }
            _ => {}
        }
    }
}

fn leads_on(links: &mut Links, index: u32) {
    if let Some(link) = links.known.get_mut(&index) {
        link.leads_on = true;
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
