//! Rules of the shape that kube-proxy writes. For nftables: one look-up for all Services, a chain for each, one for each endpoint. For iptables: the same
//! chains, and a rule for each Service that is looked at one after the other.

use std::fmt::Write;
use std::net::Ipv4Addr;

use crate::columns::{NODE_PORT, VIPS};
use crate::load::{IPERF, WEB};

/// A Service port as it is led on: protocol, port, and the chain's name.
fn ports() -> [(&'static str, u16, &'static str); 3] {
    [("tcp", WEB, "web"), ("tcp", IPERF, "bulk"), ("udp", IPERF, "udp")]
}

/// The Services of the pods, and some others: names, VIPs and pods.
fn services(pods: [Ipv4Addr; 2], others: u16) -> Vec<(String, Ipv4Addr, Ipv4Addr)> {
    let own = [("s0", VIPS[0], pods[0]), ("s1", VIPS[1], pods[1])];
    let own = own.map(|(name, vip, pod)| (name.to_owned(), vip, pod));
    let others = (0..others).map(|number| {
        let [high, low] = number.to_be_bytes();
        (format!("o{number}"), Ipv4Addr::new(10, 97, high, low), pods[0])
    });
    own.into_iter().chain(others).collect()
}

/// The `NodePort` of the first Service's port.
const fn node_port(port: u16) -> u16 {
    if port == IPERF { NODE_PORT + 1 } else { NODE_PORT }
}

/// For nftables, as `nft` reads it.
pub fn nftables(pods: [Ipv4Addr; 2], others: u16) -> String {
    let (mut chains, mut ips) = (String::new(), Vec::new());
    for (name, vip, pod) in services(pods, others) {
        for (protocol, port, kind) in ports() {
            let _ = write!(
                chains,
                "chain endpoint-{name}-{kind} {{
                    ip saddr {pod} jump mark-for-masquerade
                    meta l4proto {protocol} dnat to {pod}:{port}
                }}
                chain service-{name}-{kind} {{
                    ip daddr {vip} {protocol} dport {port} ip saddr != 10.244.0.0/16 jump mark-for-masquerade
                    numgen random mod 1 vmap {{ 0 : goto endpoint-{name}-{kind} }}
                }}
                chain external-{name}-{kind} {{
                    jump mark-for-masquerade
                    goto service-{name}-{kind}
                }}
",
            );
            ips.push(format!("{vip} . {protocol} . {port} : goto service-{name}-{kind}"));
        }
    }
    let node_ports = ports().map(|(protocol, port, kind)| {
        format!("{protocol} . {} : goto external-s0-{kind}", node_port(port))
    });
    format!(
        "table ip kube-proxy {{
            chain mark-for-masquerade {{ mark set mark or 0x4000; }}
            {chains}
            map service-ips {{
                type ipv4_addr . inet_proto . inet_service : verdict
                elements = {{ {} }}
            }}
            map service-nodeports {{
                type inet_proto . inet_service : verdict
                elements = {{ {} }}
            }}
            chain services {{
                ip daddr . meta l4proto . th dport vmap @service-ips
                ip daddr != 127.0.0.0/8 fib daddr type local meta l4proto . th dport vmap @service-nodeports
            }}
            chain nat-prerouting {{ type nat hook prerouting priority dstnat
                jump services
            }}
            chain nat-output {{ type nat hook output priority -100
                jump services
            }}
            chain nat-postrouting {{ type nat hook postrouting priority srcnat
                mark & 0x4000 != 0 mark set mark ^ 0x4000 masquerade fully-random
            }}
        }}
",
        ips.join(", "),
        node_ports.join(", "),
    )
}

/// For iptables, as `iptables-restore` reads it.
pub fn iptables(pods: [Ipv4Addr; 2], others: u16) -> String {
    let (mut chains, mut rules, mut leads) = (String::new(), String::new(), String::new());
    for (name, vip, pod) in services(pods, others) {
        for (protocol, port, kind) in ports() {
            let id = format!("{name}-{kind}");
            let _ = writeln!(
                chains,
                ":KUBE-SVC-{id} - [0:0]\n:KUBE-SEP-{id} - [0:0]\n:KUBE-EXT-{id} - [0:0]"
            );
            let to = format!(
                "-d {vip}/32 -p {protocol} -m comment --comment \"default/{id} cluster IP\" -m {protocol} --dport {port}"
            );
            let _ = writeln!(leads, "-A KUBE-SERVICES {to} -j KUBE-SVC-{id}");
            let _ = writeln!(
                rules,
                "-A KUBE-SVC-{id} ! -s 10.244.0.0/16 {to} -j KUBE-MARK-MASQ
-A KUBE-SVC-{id} -m comment --comment \"default/{id} -> {pod}:{port}\" -j KUBE-SEP-{id}
-A KUBE-SEP-{id} -s {pod}/32 -m comment --comment \"default/{id}\" -j KUBE-MARK-MASQ
-A KUBE-SEP-{id} -p {protocol} -m comment --comment \"default/{id}\" -m {protocol} -j DNAT --to-destination {pod}:{port}
-A KUBE-EXT-{id} -j KUBE-MARK-MASQ
-A KUBE-EXT-{id} -j KUBE-SVC-{id}"
            );
        }
    }
    let node_ports = ports().map(|(protocol, port, kind)| {
        let number = node_port(port);
        format!(
            "-A KUBE-NODEPORTS -p {protocol} -m {protocol} --dport {number} -j KUBE-EXT-s0-{kind}\n"
        )
    });
    format!(
        "*filter
:KUBE-FORWARD - [0:0]
-A FORWARD -j KUBE-FORWARD
-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP
-A KUBE-FORWARD -m mark --mark 0x4000/0x4000 -j ACCEPT
-A KUBE-FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
COMMIT
*nat
:KUBE-SERVICES - [0:0]
:KUBE-NODEPORTS - [0:0]
:KUBE-POSTROUTING - [0:0]
:KUBE-MARK-MASQ - [0:0]
{chains}-A PREROUTING -j KUBE-SERVICES
-A OUTPUT -j KUBE-SERVICES
-A POSTROUTING -j KUBE-POSTROUTING
-A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000
-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN
-A KUBE-POSTROUTING -j MARK --set-xmark 0x4000/0x0
-A KUBE-POSTROUTING -j MASQUERADE --random-fully
{leads}-A KUBE-SERVICES ! -d 127.0.0.0/8 -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS
{}{rules}COMMIT
",
        node_ports.concat(),
    )
}
