//! Pods that are masqueraded: on their way out of the cluster, and to `ClusterIPs` where even that is
//! asked for.

use std::net::{IpAddr, SocketAddr};

use proxy_common::tables::ServiceValue;
use proxy_common::tables::Side::{Egress, Ingress};
use proxy_common::testing::{Hook, NODE, Packet, Service, ends, is_valid};
use proxy_common::{Outcome, V4, V6, proto};
use proxy_ebpf::testing::{Host, HostFamily};

use crate::{ACK, SYN, at};

/// Who talks to whom in a family.
struct Cast {
    pod: SocketAddr,
    outside: SocketAddr,
    node: IpAddr,
}

fn cast<F: HostFamily>() -> Cast {
    let is_v4 = F::BITS == 32;
    let [pod, outside] = if is_v4 {
        ["10.244.0.7:4000", "198.51.100.9:443"]
    } else {
        ["[fd00:244::7]:4000", "[2001:db8:9::9]:443"]
    };
    Cast { pod: at(pod), outside: at(outside), node: NODE[usize::from(!is_v4)] }
}

/// A host that masquerades what pods send out of the cluster.
fn masquerading<F: HostFamily>() -> (Host<F>, Cast) {
    let (mut host, cast) = (Host::<F>::new(), cast::<F>());
    host.serve(&[]);
    host.settings.masquerade_pods = 1;
    host.pods = Some((cast.pod.ip(), 16));
    host.exit = Some(cast.node);
    (host, cast)
}

fn out_and_back<F: HostFamily>() {
    let (host, cast) = masquerading::<F>();
    for proto in [proto::TCP, proto::UDP] {
        let packet = |side, src, dst, flags| match proto {
            proto::TCP => Packet::tcp(side, src, dst, flags),
            _ => Packet::udp(side, src, dst),
        };
        let there = packet(Egress, cast.pod, cast.outside, SYN);
        let (outcome, frame) = host.see(Hook::Egress, &there.frame());
        assert_eq!(outcome, Outcome::Masqueraded);
        let [seen_as, to] = ends(&frame);
        assert_eq!((seen_as.ip(), to), (cast.node, cast.outside));
        assert_eq!(seen_as.port(), cast.pod.port(), "its own, which is free");
        assert_eq!(frame, Packet { src: seen_as, ..there.clone() }.frame());
        let back = packet(Ingress, cast.outside, seen_as, SYN | ACK);
        let (outcome, frame) = host.see(Hook::Uplink, &back.frame());
        assert_eq!(outcome, Outcome::Masqueraded);
        assert_eq!(frame, Packet { dst: cast.pod, ..back.clone() }.frame());
        // It is no Service's, so there is no backend that could go.
        let more = packet(Egress, cast.pod, cast.outside, ACK);
        for _ in 0..2 {
            let (outcome, frame) = host.see(Hook::Egress, &more.frame());
            assert_eq!(outcome, Outcome::Masqueraded);
            assert_eq!(frame, Packet { src: seen_as, ..more.clone() }.frame());
        }
    }
}

fn what_is_left_alone<F: HostFamily>() {
    let (mut host, cast) = masquerading::<F>();
    let untouched = |host: &Host<F>, packet: &Packet| {
        assert_eq!(host.see(Hook::Egress, &packet.frame()), (Outcome::NotService, packet.frame()));
    };
    let syn = Packet::tcp(Egress, cast.pod, cast.outside, SYN);
    // The node's own, and the answer to someone who has asked the pod itself.
    untouched(&host, &Packet { src: SocketAddr::new(cast.node, 1), ..syn.clone() });
    untouched(&host, &Packet::tcp(Egress, cast.pod, cast.outside, SYN | ACK));
    untouched(&host, &Packet::tcp(Egress, cast.pod, cast.outside, ACK));
    host.ranges = vec![(0, cast.outside.ip(), 24)];
    untouched(&host, &syn);
    // Of a Service's source ranges that says nothing.
    host.ranges = vec![(1, cast.outside.ip(), 24)];
    assert_eq!(host.see(Hook::Egress, &syn.frame()).0, Outcome::Masqueraded);
    let (mut host, _) = masquerading::<F>();
    host.exit = None;
    untouched(&host, &syn);
    host.exit = Some(cast.node);
    host.settings.masquerade_pods = 0;
    untouched(&host, &syn);
}

/// Datagrams that come in for a pod by its own address, and their answers. They are noted where flows can
/// be evicted, and never live (fault E).
fn asked_by_its_own_address<F: HostFamily>() {
    let (host, cast) = masquerading::<F>();
    let there = Packet::udp(Ingress, cast.outside, cast.pod);
    let back = Packet::udp(Egress, cast.pod, cast.outside);
    for _ in 0..3 {
        let untouched = |packet: &Packet| (Outcome::NotService, packet.frame());
        assert_eq!(host.see(Hook::Uplink, &there.frame()), untouched(&there));
        assert_eq!(host.see(Hook::Egress, &back.frame()), untouched(&back));
    }
    assert_eq!((host.flows(), host.embryos().len()), (0, 1));
    // Nobody has asked from that port.
    let other = SocketAddr::new(cast.outside.ip(), 9);
    let unasked = Packet::udp(Egress, cast.pod, other);
    assert_eq!(host.see(Hook::Egress, &unasked.frame()).0, Outcome::Masqueraded);
    // Who would not be masqueraded need not be known.
    let (mut host, _) = masquerading::<F>();
    host.ranges = vec![(0, cast.outside.ip(), 24)];
    host.see(Hook::Uplink, &there.frame());
    assert!(host.embryos().is_empty());
}

/// Two pods from one port to one server: they are told apart, or the second is refused.
fn two_pods_to_one_server<F: HostFamily>() {
    let (mut host, cast) = masquerading::<F>();
    let neighbour = at(if F::BITS == 32 { "10.244.0.8:4000" } else { "[fd00:244::8]:4000" });
    let seen_as = |host: &Host<F>, pod| {
        let (outcome, frame) =
            host.see(Hook::Egress, &Packet::udp(Egress, pod, cast.outside).frame());
        (outcome, ends(&frame)[0])
    };
    let (first, second) = (seen_as(&host, cast.pod), seen_as(&host, neighbour));
    assert_eq!((first.0, second.0), (Outcome::Masqueraded, Outcome::Masqueraded));
    assert_ne!(first.1, second.1);
    (host, _) = masquerading::<F>();
    (host.settings.first_port, host.settings.port_count) = (4000, 1);
    assert_eq!(seen_as(&host, cast.pod).0, Outcome::Masqueraded);
    let answer = Packet::udp(Ingress, cast.outside, SocketAddr::new(cast.node, 4000));
    assert_eq!(host.see(Hook::Uplink, &answer.frame()).0, Outcome::Masqueraded);
    assert_eq!(seen_as(&host, cast.pod).0, Outcome::Masqueraded);
    assert_eq!(seen_as(&host, neighbour).0, Outcome::NoPort);
}

fn pings<F: HostFamily>() {
    let (host, cast) = masquerading::<F>();
    let [request, reply] = F::ECHO;
    let echo = |side, src, dst, kind, id: u16| {
        let [high, low] = id.to_be_bytes();
        Packet::icmp(side, src, dst, [kind, 0], b"ping".to_vec()).with_rest([high, low, 0, 1])
    };
    let there = echo(Egress, cast.pod.ip(), cast.outside.ip(), request, 7);
    let (outcome, frame) = host.see(Hook::Egress, &there.frame());
    assert_eq!(outcome, Outcome::Masqueraded);
    assert!(is_valid(&frame));
    let l4 = if cast.pod.is_ipv4() { 34 } else { 54 };
    let id = u16::from_be_bytes([frame[l4 + 4], frame[l4 + 5]]);
    assert_eq!(frame, echo(Egress, cast.node, cast.outside.ip(), request, id).frame());
    let back = echo(Ingress, cast.outside.ip(), cast.node, reply, id);
    let (outcome, frame) = host.see(Hook::Uplink, &back.frame());
    assert_eq!(outcome, Outcome::Masqueraded);
    assert_eq!(frame, echo(Ingress, cast.outside.ip(), cast.pod.ip(), reply, 7).frame());
    // The node's own requests and their answers.
    let own = echo(Egress, cast.node, cast.outside.ip(), request, 8);
    assert_eq!(host.see(Hook::Egress, &own.frame()).0, Outcome::NotService);
    let own = echo(Ingress, cast.outside.ip(), cast.node, reply, 8);
    assert_eq!(host.see(Hook::Uplink, &own.frame()).0, Outcome::NotService);
}

/// KP-82.
fn even_to_cluster_ips<F: HostFamily>() {
    let (mut host, cast) = (Host::<F>::new(), cast::<F>());
    let is_v4 = F::BITS == 32;
    let vip = at(if is_v4 { "10.96.0.1:80" } else { "[fd00:96::1]:80" });
    let backend = at(if is_v4 { "10.244.1.8:8080" } else { "[fd00:244:1::8]:8080" });
    let service = |local: &[SocketAddr], flags| Service {
        local: local.to_vec(),
        flags,
        ..Service::new(vip, proto::TCP, &[backend])
    };
    host.settings.masquerade_all = 1;
    host.serve(&[service(&[], ServiceValue::REFUSES)]);
    let syn = Packet::tcp(Ingress, cast.pod, vip, SYN);
    let (outcome, frame) = host.see(Hook::Ingress, &syn.frame());
    // Its CNI's policies see the pod.
    assert_eq!((outcome, ends(&frame)), (Outcome::Opened, [cast.pod, backend]));
    let (outcome, frame) = host.see(Hook::Egress, &frame);
    assert_eq!(outcome, Outcome::Masqueraded);
    let [seen_as, to] = ends(&frame);
    assert_eq!((seen_as.ip(), to), (cast.node, backend));
    let answer = Packet::tcp(Ingress, backend, seen_as, SYN | ACK);
    let (outcome, frame) = host.see(Hook::Uplink, &answer.frame());
    assert_eq!((outcome, ends(&frame)), (Outcome::Masqueraded, [backend, cast.pod]));
    let (outcome, frame) = host.see(Hook::Egress, &frame);
    assert_eq!(outcome, Outcome::Replied);
    assert_eq!(frame, Packet { src: vip, dst: cast.pod, ..answer }.frame());
    // Not to a pod of this node, whose answers come by here anyway; nor by other doors.
    for (local, flags) in [(vec![backend], ServiceValue::REFUSES), (vec![], 0)] {
        let mut host = Host::<F>::new();
        host.settings.masquerade_all = 1;
        host.serve(&[service(&local, flags)]);
        let (outcome, frame) = host.see(Hook::Ingress, &syn.frame());
        assert_eq!((outcome, ends(&frame)[0]), (Outcome::Opened, cast.pod));
    }
}

#[test]
fn pods_leave_the_cluster_with_the_nodes_address() {
    out_and_back::<V4>();
    out_and_back::<V6>();
}

#[test]
fn the_list_the_node_and_answers_are_left_alone() {
    what_is_left_alone::<V4>();
    what_is_left_alone::<V6>();
}

#[test]
fn who_asks_a_pod_by_its_own_address_hears_of_no_other() {
    asked_by_its_own_address::<V4>();
    asked_by_its_own_address::<V6>();
}

#[test]
fn two_pods_from_one_port_to_one_server_are_told_apart_or_refused() {
    two_pods_to_one_server::<V4>();
    two_pods_to_one_server::<V6>();
}

#[test]
fn pods_ping_out_of_the_cluster() {
    pings::<V4>();
    pings::<V6>();
}

#[test]
fn kp_82_even_cluster_ips_are_masqueraded_if_that_is_asked_for() {
    even_to_cluster_ips::<V4>();
    even_to_cluster_ips::<V6>();
}
