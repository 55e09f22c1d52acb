//! Configures the network of a namespace by netlink.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::AsRawFd;

use futures::TryStreamExt;
use rtnetlink::packet_route::address::AddressHeaderFlags;
use rtnetlink::packet_route::link::{LinkAttribute, MacVlanMode};
use rtnetlink::packet_route::neighbour::NeighbourFlags;
use rtnetlink::packet_route::route::{RouteAttribute, RouteMessage};
use rtnetlink::packet_route::rule::{RuleAction, RuleAttribute};
use rtnetlink::{
    Handle, IpVersion, LinkBridge, LinkMacVlan, LinkMessageBuilder, LinkUnspec, LinkVeth,
    LinkVxlan, RouteMessageBuilder,
};

use super::namespace::Namespace;

/// The number of the main table of routes.
const MAIN_TABLE: u32 = 254;

/// Links, addresses and routes of the namespace that the calling thread is in.
pub struct Net {
    pub(super) handle: Handle,
}

impl Net {
    /// The index of a link.
    pub async fn index(&self, link: &str) -> u32 {
        use futures::TryStreamExt;
        let mut found = self.handle.link().get().match_name(link.to_owned()).execute();
        let message = found.try_next().await.ok().flatten();
        message.unwrap_or_else(|| panic!("no link {link}")).header.index
    }

    /// Makes a pair of links: `name` here, `peer` in another namespace.
    pub async fn veth(&self, name: &str, peer: &str, namespace: &Namespace) {
        // By a name of its own until it has moved: the peer's may be taken here.
        let passing = format!("{name}-peer");
        let pair = LinkVeth::new(name, &passing).build();
        self.handle.link().add(pair).execute().await.expect("a veth pair");
        let index = self.index(&passing).await;
        let fd = namespace.fd().as_raw_fd();
        let moved = LinkUnspec::new_with_index(index).setns_by_fd(fd).name(peer.to_owned());
        self.handle.link().set(moved.build()).execute().await.expect("the peer moves");
    }

    /// Makes a pair of links whose end here is a bridge's port, and up: `name` here, `peer` in another namespace.
    pub async fn port(&self, name: &str, peer: &str, namespace: &Namespace, bridge: &str) {
        self.veth(name, peer, namespace).await;
        self.enslave(name, bridge).await;
        self.up(name).await;
    }

    /// Makes a bridge.
    pub async fn bridge(&self, name: &str) {
        let bridge = LinkBridge::new(name).build();
        self.handle.link().add(bridge).execute().await.expect("a bridge");
    }

    /// How many traffic control filters a link has.
    pub async fn filters(&self, link: &str) -> usize {
        use futures::TryStreamExt;
        let index = i32::try_from(self.index(link).await).expect("a small number");
        let mut count = 0;
        for ingress in [true, false] {
            let mut filters = self.handle.traffic_filter(index);
            let request = filters.get();
            let request = if ingress { request.ingress() } else { request.egress() };
            // The kernel tells of each filter's chain head too, which has no handle.
            let mut found = request.execute();
            while let Ok(Some(filter)) = found.try_next().await {
                count += usize::from(u32::from(filter.header.handle) != 0);
            }
        }
        count
    }

    /// Makes a vxlan tunnel to another node.
    pub async fn vxlan(&self, name: &str, remote: Ipv4Addr) {
        let tunnel = LinkVxlan::new(name, 1).remote(remote).port(4789).build();
        self.handle.link().add(tunnel).execute().await.expect("a vxlan tunnel");
        self.mtu(name, 1450).await;
    }

    /// Makes a link a bridge's port.
    pub async fn enslave(&self, link: &str, bridge: &str) {
        let controller = self.index(bridge).await;
        self.set(link, |message| message.controller(controller)).await;
    }

    /// Brings a link up.
    pub async fn up(&self, link: &str) {
        self.set(link, LinkMessageBuilder::up).await;
    }

    /// Sets a link's MTU.
    pub async fn mtu(&self, link: &str, mtu: u32) {
        self.set(link, |message| message.mtu(mtu)).await;
    }

    async fn set(
        &self,
        link: &str,
        change: impl FnOnce(LinkMessageBuilder<LinkUnspec>) -> LinkMessageBuilder<LinkUnspec>,
    ) {
        let message = change(LinkUnspec::new_with_index(self.index(link).await)).build();
        let result = self.handle.link().set(message).execute().await;
        result.unwrap_or_else(|error| panic!("link {link}: {error}"));
    }

    /// Removes a link.
    pub async fn remove(&self, link: &str) {
        let index = self.index(link).await;
        self.handle.link().del(index).execute().await.expect("the link goes");
    }

    /// Gives a link an address.
    pub async fn address(&self, link: &str, address: IpAddr, prefix: u8) {
        let index = self.index(link).await;
        let mut request = self.handle.address().add(index, address, prefix);
        // At once in use: nobody else can have it.
        request.message_mut().header.flags = AddressHeaderFlags::Nodad;
        let added = request.execute().await;
        added.unwrap_or_else(|error| panic!("{address} on {link}: {error}"));
    }

    /// Takes an address away from a link.
    pub async fn unaddress(&self, link: &str, address: IpAddr) {
        use futures::TryStreamExt;
        let index = self.index(link).await;
        let request = self.handle.address().get().set_link_index_filter(index);
        let mut found = request.set_address_filter(address).execute();
        let message = found.try_next().await.ok().flatten();
        let message = message.unwrap_or_else(|| panic!("no {address} on {link}"));
        self.handle.address().del(message).execute().await.expect("the address goes");
    }

    /// Makes a link by which another namespace has a station of its own on `parent`.
    pub async fn macvlan(&self, name: &str, parent: &str, namespace: &Namespace) {
        let passing = format!("{name}-mv");
        let parent = self.index(parent).await;
        let link = LinkMacVlan::new(&passing, parent, MacVlanMode::Bridge).build();
        self.handle.link().add(link).execute().await.expect("a macvlan link");
        let index = self.index(&passing).await;
        let fd = namespace.fd().as_raw_fd();
        let moved = LinkUnspec::new_with_index(index).setns_by_fd(fd).name(name.to_owned());
        self.handle.link().set(moved.build()).execute().await.expect("the link moves");
    }

    /// Gives a bridge the link-layer address of one of its ports, which stays then.
    pub async fn pin_address(&self, bridge: &str, port: &str) {
        use futures::TryStreamExt;
        let mut found = self.handle.link().get().match_name(port.to_owned()).execute();
        let message = found.try_next().await.ok().flatten().expect("the port is there");
        let own = message.attributes.into_iter().find_map(|attribute| match attribute {
            LinkAttribute::Address(address) => Some(address),
            _ => None,
        });
        let own = own.expect("it has one");
        self.set(bridge, |message| message.address(own)).await;
    }

    /// Answers at a link for an IPv6 address that another link has: with IPv4 every link answers for all.
    pub async fn answer_for(&self, link: &str, address: Ipv6Addr) {
        let index = self.index(link).await;
        let request = self.handle.neighbours().add(index, address.into());
        let added = request.flags(NeighbourFlags::Proxy).execute().await;
        added.unwrap_or_else(|error| panic!("{address} on {link}: {error}"));
    }

    /// Puts the qdisc before what comes in by a link, as others beside us do, or takes it away.
    pub async fn ingress(&self, link: &str, present: bool) {
        const INGRESS: u32 = 0xffff_fff1;
        let index = i32::try_from(self.index(link).await).expect("a small number");
        let changed = if present {
            self.handle.qdisc().add(index).ingress().execute().await
        } else {
            let mut request = self.handle.qdisc().del(index);
            request.message_mut().header.parent = INGRESS.into();
            request.execute().await
        };
        changed.unwrap_or_else(|error| panic!("ingress of {link}: {error}"));
    }

    /// Gives a link another name.
    pub async fn rename(&self, link: &str, name: &str) {
        self.set(link, |message| message.name(name.to_owned())).await;
    }

    /// Adds a route by a gateway.
    pub async fn route(&self, to: IpAddr, prefix: u8, gateway: IpAddr) {
        let added = self.handle.route().add(by_gateway(to, prefix, gateway)).execute().await;
        added.unwrap_or_else(|error| panic!("route to {to}/{prefix}: {error}"));
    }

    /// Adds a default route by a gateway to a table that a rule leads to: for what has this source.
    pub async fn route_from(&self, source: IpAddr, table: u32, gateway: IpAddr) {
        let v6 = source.is_ipv6();
        self.route_in(table, super::worlds::any(v6), 0, gateway).await;
        self.rule_from(source, if v6 { 128 } else { 32 }, table).await;
    }

    /// Adds a route by a gateway to a table.
    pub async fn route_in(&self, table: u32, to: IpAddr, prefix: u8, gateway: IpAddr) {
        let mut message = by_gateway(to, prefix, gateway);
        message.attributes.push(RouteAttribute::Table(table));
        message.header.table = 0;
        self.handle.route().add(message).execute().await.expect("a route");
    }

    /// Adds a rule that leads what comes from a range to a table.
    pub async fn rule_from(&self, source: IpAddr, prefix: u8, table: u32) {
        let rule = self.handle.rule().add().action(RuleAction::ToTable).table_id(table);
        let added = match source {
            IpAddr::V4(source) => rule.v4().source_prefix(source, prefix).execute().await,
            IpAddr::V6(source) => rule.v6().source_prefix(source, prefix).execute().await,
        };
        added.unwrap_or_else(|error| panic!("a rule for {source}: {error}"));
    }

    /// How many rules there are, of both families, by which ways are looked up.
    pub async fn rules(&self) -> usize {
        let mut count = 0;
        for version in [IpVersion::V4, IpVersion::V6] {
            let rules: Vec<_> =
                self.handle.rule().get(version).execute().try_collect().await.expect("rules");
            count += rules.len();
        }
        count
    }

    /// Adds a rule that leads what goes to a range to the main table, before other rules.
    pub async fn rule_to(&self, to: IpAddr, prefix: u8) {
        let rules = self.handle.rule();
        let rule = rules.add().action(RuleAction::ToTable).table_id(MAIN_TABLE).priority(512);
        let added = match to {
            IpAddr::V4(to) => rule.v4().destination_prefix(to, prefix).execute().await,
            IpAddr::V6(to) => rule.v6().destination_prefix(to, prefix).execute().await,
        };
        added.unwrap_or_else(|error| panic!("a rule to {to}: {error}"));
    }

    /// Adds a rule that leads what has a bit of a mark to the main table, before other rules.
    pub async fn rule_of_mark(&self, v6: bool, bit: u32) {
        let rules = self.handle.rule();
        let rule = rules
            .add()
            .action(RuleAction::ToTable)
            .table_id(MAIN_TABLE)
            .priority(1024)
            .fw_mark(bit);
        let added = if v6 {
            let mut rule = rule.v6();
            rule.message_mut().attributes.push(RuleAttribute::FwMask(bit));
            rule.execute().await
        } else {
            let mut rule = rule.v4();
            rule.message_mut().attributes.push(RuleAttribute::FwMask(bit));
            rule.execute().await
        };
        added.expect("a rule by mark");
    }

    /// Removes a route by a gateway.
    pub async fn unroute(&self, to: IpAddr, prefix: u8, gateway: IpAddr) {
        let removed = self.handle.route().del(by_gateway(to, prefix, gateway)).execute().await;
        removed.unwrap_or_else(|error| panic!("route to {to}/{prefix}: {error}"));
    }

    /// Adds an IPv6 route by a link-local gateway.
    pub async fn route_by(&self, to: Ipv6Addr, prefix: u8, gateway: IpAddr, link: &str) {
        let IpAddr::V6(gateway) = gateway else { panic!("{gateway} is no IPv6 address") };
        let message = RouteMessageBuilder::<Ipv6Addr>::new()
            .destination_prefix(to, prefix)
            .gateway(gateway)
            .output_interface(self.index(link).await)
            .build();
        self.handle.route().add(message).execute().await.expect("a route");
    }

    /// Adds a route to what a link leads to.
    pub async fn link_route(&self, to: IpAddr, prefix: u8, link: &str) {
        let index = self.index(link).await;
        let message = match to {
            IpAddr::V4(to) => RouteMessageBuilder::<Ipv4Addr>::new()
                .destination_prefix(to, prefix)
                .output_interface(index)
                .scope(rtnetlink::packet_route::route::RouteScope::Link)
                .build(),
            IpAddr::V6(to) => RouteMessageBuilder::<Ipv6Addr>::new()
                .destination_prefix(to, prefix)
                .output_interface(index)
                .build(),
        };
        let added = self.handle.route().add(message).execute().await;
        added.unwrap_or_else(|error| panic!("route to {to}/{prefix}: {error}"));
    }
}

fn by_gateway(to: IpAddr, prefix: u8, gateway: IpAddr) -> RouteMessage {
    match (to, gateway) {
        (IpAddr::V4(to), IpAddr::V4(gateway)) => RouteMessageBuilder::<Ipv4Addr>::new()
            .destination_prefix(to, prefix)
            .gateway(gateway)
            .build(),
        (IpAddr::V6(to), IpAddr::V6(gateway)) => RouteMessageBuilder::<Ipv6Addr>::new()
            .destination_prefix(to, prefix)
            .gateway(gateway)
            .build(),
        _ => panic!("a route to {to} by {gateway}"),
    }
}
