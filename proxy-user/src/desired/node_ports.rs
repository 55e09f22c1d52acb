//! Which of the node's addresses take `NodePorts` (KP-30 to 34).

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnet::IpNet;

use crate::model::{IpFamily, Node};

/// `--nodeport-addresses`.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub enum NodePortAddresses {
    /// The node's primary address of each family; all if it is not known (KP-32). The default, as in
    /// nftables mode (KP-30).
    #[default]
    Primary,
    /// Those within these ranges; all of a family that has no range (KP-33).
    Within(Vec<IpNet>),
}

impl NodePortAddresses {
    /// The addresses that take `NodePorts`, out of all that the node has. Loopback never does (KP-35),
    /// nor do link-local addresses, which mean nothing without their link.
    pub fn select(&self, local: &BTreeSet<IpAddr>, node: &Node) -> BTreeSet<IpAddr> {
        let eligible = local.iter().filter(|address| is_eligible(**address));
        eligible.filter(|address| self.takes(**address, node)).copied().collect()
    }

    /// The addresses at which to listen for health checks (KP-102): those that take `NodePorts` if they
    /// are given by range, or else any.
    pub fn listen_at(&self, local: Option<&BTreeSet<IpAddr>>, node: &Node) -> BTreeSet<IpAddr> {
        match (self, local) {
            (Self::Within(_), Some(local)) => self.select(local, node),
            _ => [IpFamily::V4, IpFamily::V6].map(IpFamily::any).into(),
        }
    }

    fn takes(&self, address: IpAddr, node: &Node) -> bool {
        let family = IpFamily::of(address);
        match self {
            Self::Primary => {
                let mut primary = node.addresses.iter().filter(|a| IpFamily::of(**a) == family);
                primary.next().is_none_or(|primary| *primary == address)
            }
            Self::Within(ranges) => {
                let mut ranges = ranges.iter().filter(|r| IpFamily::of(r.addr()) == family);
                let first = ranges.next();
                first.is_none_or(|first| first.contains(&address))
                    || ranges.any(|range| range.contains(&address))
            }
        }
    }
}

/// Whether an address can be reached from elsewhere.
pub fn is_eligible(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => !address.is_loopback(),
        IpAddr::V6(address) => !address.is_loopback() && !address.is_unicast_link_local(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn selected(rule: &NodePortAddresses, primary: &[&str]) -> Vec<String> {
        let local =
            ["127.0.0.1", "10.0.0.1", "192.168.0.1", "::1", "fe80::1", "fd00::1", "2001:db8::1"];
        let local = local.map(|address| address.parse().unwrap()).into();
        let addresses = primary.iter().map(|address| address.parse().unwrap()).collect();
        let node = Node { addresses, ..Node::default() };
        rule.select(&local, &node).iter().map(ToString::to_string).collect()
    }

    fn within(ranges: &[&str]) -> NodePortAddresses {
        NodePortAddresses::Within(ranges.iter().map(|range| range.parse().unwrap()).collect())
    }

    #[test]
    fn kp_32_primary_means_the_nodes_address_or_all_if_it_is_not_known() {
        let primary = NodePortAddresses::Primary;
        assert_eq!(selected(&primary, &["10.0.0.1", "fd00::1"]), ["10.0.0.1", "fd00::1"]);
        assert_eq!(selected(&primary, &["10.0.0.1"]), ["10.0.0.1", "2001:db8::1", "fd00::1"]);
        let all = ["10.0.0.1", "192.168.0.1", "2001:db8::1", "fd00::1"];
        assert_eq!(selected(&primary, &[]), all);
    }

    #[test]
    fn kp_31_and_33_ranges_select_and_a_family_without_one_takes_all() {
        assert_eq!(selected(&within(&["10.0.0.0/8", "fd00::/8"]), &[]), ["10.0.0.1", "fd00::1"]);
        let mixed = ["192.168.0.1", "2001:db8::1", "fd00::1"];
        assert_eq!(selected(&within(&["192.168.0.0/16"]), &[]), mixed);
        assert_eq!(selected(&within(&["0.0.0.0/0", "::1/128"]), &[]), ["10.0.0.1", "192.168.0.1"]);
        assert_eq!(selected(&within(&["127.0.0.0/8", "::1/128"]), &[]), [""; 0]);
    }

    #[test]
    fn kp_102_health_checks_are_where_ranges_say_or_anywhere() {
        let local: BTreeSet<IpAddr> =
            ["10.0.0.1", "192.168.0.1", "fd00::1"].map(|t| t.parse().unwrap()).into();
        let at = |rule: &NodePortAddresses, local: Option<&BTreeSet<IpAddr>>| -> Vec<String> {
            rule.listen_at(local, &Node::default()).iter().map(ToString::to_string).collect()
        };
        assert_eq!(at(&within(&["10.0.0.0/8"]), Some(&local)), ["10.0.0.1", "fd00::1"]);
        assert_eq!(at(&within(&["10.0.0.0/8"]), None), ["0.0.0.0", "::"]);
        assert_eq!(at(&NodePortAddresses::Primary, Some(&local)), ["0.0.0.0", "::"]);
    }
}
