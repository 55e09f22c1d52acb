//! Rules of the shape that kube-proxy writes for nftables: one look-up for all Services, a chain for each, one for each endpoint.

use std::fmt::Write;
use std::net::Ipv4Addr;

use crate::columns::{NODE_PORT, VIPS};
use crate::load::{IPERF, WEB};

/// A Service port as it is led on: protocol, port, and the chain's name.
fn ports() -> [(&'static str, u16, &'static str); 3] {
    [("tcp", WEB, "web"), ("tcp", IPERF, "bulk"), ("udp", IPERF, "datagrams")]
}

/// For the Services of the pods, and some others.
pub fn of(pods: [Ipv4Addr; 2], others: u16) -> String {
    let (mut chains, mut ips) = (String::new(), Vec::new());
    let mut service = |name: &str, vip: Ipv4Addr, pod: Ipv4Addr| {
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
    };
    service("s0", VIPS[0], pods[0]);
    service("s1", VIPS[1], pods[1]);
    for number in 0..others {
        let [high, low] = number.to_be_bytes();
        service(&format!("other{number}"), Ipv4Addr::new(10, 97, high, low), pods[0]);
    }
    let node_ports = ports().map(|(protocol, port, kind)| {
        let number = NODE_PORT + u16::from(port == IPERF);
        format!("{protocol} . {number} : goto external-s0-{kind}")
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
