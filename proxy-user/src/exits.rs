//! By which of its own addresses the node masquerades what leaves by a link, for each part of the world: as the kernel's own
//! MASQUERADE chooses them. No I/O.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

/// An address that a link has.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Own {
    /// The address, and how long its subnet's prefix is.
    pub net: IpNet,
    /// Whether it is not to be chosen where there is another one: deprecated, or made for a while only (RFC 6724).
    pub is_last: bool,
}

/// The addresses by link, each with toward whom it is used. The longest range that fits counts.
pub type Exits = BTreeMap<u32, Vec<(IpNet, IpAddr)>>;

/// The exits of a link with these addresses; where it has none of a family, the first of the node's others.
pub fn of_link(own: &[Own], others: &[IpAddr]) -> Vec<(IpNet, IpAddr)> {
    let of = |is_family: fn(&IpAddr) -> bool| {
        let mut own: Vec<Own> =
            own.iter().copied().filter(|own| is_family(&own.net.addr())).collect();
        if own.is_empty() {
            let other = others.iter().copied().find(is_family);
            own.extend(other.map(|address| Own { net: address.into(), is_last: false }));
        }
        own.sort_by_key(|own| own.is_last);
        own
    };
    let mut exits = v4(&of(IpAddr::is_ipv4));
    exits.extend(v6(&of(IpAddr::is_ipv6)));
    exits
}

/// Toward a gateway, or a destination without one: the first address in whose subnet that is, or else the first
/// (`inet_select_addr`).
fn v4(own: &[Own]) -> Vec<(IpNet, IpAddr)> {
    let everyone = own.first().map(|own| (Ipv4Net::default().into(), own.net.addr()));
    ranges(own, everyone)
}

/// Toward a destination: an address of the same subnet, or else of the same kind, unique local or global, or else any
/// (RFC 6724, rules 3, 6, 7 and 8; others' labels are left out).
fn v6(own: &[Own]) -> Vec<(IpNet, IpAddr)> {
    let Some(any) = own.first() else { return Vec::new() };
    let is_local = |own: &&Own| matches!(own.net.addr(), IpAddr::V6(ip) if ip.is_unique_local());
    let local = own.iter().find(is_local).unwrap_or(any);
    let global = own.iter().find(|own| !is_local(own)).unwrap_or(any);
    let locals = "fc00::/7".parse().expect("a range");
    let wide = [(Ipv6Net::default().into(), global.net.addr()), (locals, local.net.addr())];
    ranges(own, wide)
}

/// The subnets, each with its first address, behind wider ranges.
fn ranges(own: &[Own], wide: impl IntoIterator<Item = (IpNet, IpAddr)>) -> Vec<(IpNet, IpAddr)> {
    let mut exits: Vec<(IpNet, IpAddr)> = wide.into_iter().collect();
    for own in own {
        let subnet = own.net.trunc();
        if !exits.iter().any(|(known, _)| *known == subnet) {
            exits.push((subnet, own.net.addr()));
        }
    }
    exits
}

#[cfg(test)]
mod tests {
    use super::*;

    fn own(text: &str) -> Own {
        let (net, is_last) = match text.strip_suffix('-') {
            Some(net) => (net, true),
            None => (text, false),
        };
        Own { net: net.parse().unwrap(), is_last }
    }

    /// The address that is used toward someone.
    fn exit(own_addresses: &[&str], toward: &str) -> Option<String> {
        let own: Vec<Own> = own_addresses.iter().map(|text| own(text)).collect();
        let toward: IpAddr = toward.parse().unwrap();
        let others = ["127.7.7.7".parse().unwrap(), "::7".parse().unwrap()];
        let exits = of_link(&own, &others).into_iter();
        let fitting = exits.filter(|(range, _)| range.contains(&toward));
        fitting.max_by_key(|(range, _)| range.prefix_len()).map(|(_, exit)| exit.to_string())
    }

    /// Case 13.
    #[test]
    fn an_exit_is_of_the_gateways_subnet() {
        let two = ["10.77.0.11/24", "192.0.2.11/24", "192.0.2.12/24"];
        assert_eq!(exit(&two, "192.0.2.1").as_deref(), Some("192.0.2.11"));
        assert_eq!(exit(&two, "10.77.0.1").as_deref(), Some("10.77.0.11"));
        assert_eq!(
            exit(&two, "198.18.0.9").as_deref(),
            Some("10.77.0.11"),
            "on the link, by a route"
        );
        assert_eq!(exit(&["192.0.2.11/32"], "192.0.2.1").as_deref(), Some("192.0.2.11"));
        assert_eq!(exit(&["fd00::11/64"], "192.0.2.1").as_deref(), Some("127.7.7.7"), "unnumbered");
    }

    #[test]
    fn an_ipv6_exit_is_of_the_destinations_kind() {
        let both = ["fd00::11/64", "2001:db8:1::11/64"];
        assert_eq!(exit(&both, "2001:db8:9::1").as_deref(), Some("2001:db8:1::11"));
        assert_eq!(exit(&both, "fd77::1").as_deref(), Some("fd00::11"));
        assert_eq!(exit(&both, "2001:db8:1::1").as_deref(), Some("2001:db8:1::11"));
        assert_eq!(exit(&["fd00::11/64"], "2001:db8:9::1").as_deref(), Some("fd00::11"));
        let old = ["2001:db8:1::11/64-", "2001:db8:2::11/64"];
        assert_eq!(exit(&old, "2001:db8:9::1").as_deref(), Some("2001:db8:2::11"));
        assert_eq!(exit(&["2001:db8:1::11/64-"], "::1").as_deref(), Some("2001:db8:1::11"));
    }
}
