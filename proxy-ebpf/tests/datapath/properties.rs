//! Properties over random packets.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use proptest::prelude::*;
use proxy_common::checksum;
use proxy_common::tables::Side::{Egress, Ingress};
use proxy_common::tables::{FlowKey, Part};
use proxy_common::testing::{Hook, Packet, Service, Step, Transport, cases, is_valid};
use proxy_common::{Outcome, Port, V4, V6, proto};
use proxy_ebpf::datapath::rewrite;
use proxy_ebpf::packet::Frame;
use proxy_ebpf::testing::{Buffer, Host, HostFamily};

use crate::{SYN, at, pod, vip};

/// Two ends and a VIP of one family.
fn any_ends() -> impl Strategy<Value = [SocketAddr; 3]> {
    let v4 = any::<[([u8; 4], u16); 3]>().prop_map(|ends| ends.map(SocketAddr::from));
    let v6 = any::<[([u16; 8], u16); 3]>().prop_map(|ends| ends.map(SocketAddr::from));
    let usable = |ends: &[SocketAddr; 3]| {
        let ips: BTreeSet<IpAddr> = ends.iter().map(SocketAddr::ip).collect();
        ips.len() == 3 && ends.iter().all(|end| end.port() != 0)
    };
    prop_oneof![v4, v6].prop_filter("three addresses", usable)
}

fn any_packet(src: SocketAddr, dst: SocketAddr) -> impl Strategy<Value = Packet> {
    let payload = proptest::collection::vec(any::<u8>(), 0..100);
    (any::<bool>(), any::<bool>(), payload).prop_map(move |(tcp, options, payload)| {
        let packet =
            if tcp { Packet::tcp(Ingress, src, dst, SYN) } else { Packet::udp(Ingress, src, dst) };
        Packet { options, payload, ..packet }
    })
}

fn there_and_back<F: HostFamily>(sent: &Packet, pod: SocketAddr) {
    let mut host = Host::<F>::new();
    let service = |proto| Service::new(sent.dst, proto, &[pod]);
    host.serve(&[service(proto::TCP), service(proto::UDP)]);
    let (outcome, arrived) = host.see(Hook::Ingress, &sent.frame());
    assert_eq!(outcome, Outcome::Opened);
    assert!(is_valid(&arrived), "a checksum is wrong on the way there");
    assert_eq!(arrived, Packet { dst: pod, ..sent.clone() }.frame());
    // The pod sends the same packet back, as an echo; the client gets what it sent, turned around.
    let echo = Packet { side: Egress, src: pod, dst: sent.src, ..sent.clone() };
    let (outcome, returned) = host.see(Hook::Egress, &echo.frame());
    assert_eq!(outcome, Outcome::Replied);
    assert!(is_valid(&returned), "a checksum is wrong on the way back");
    assert_eq!(
        returned,
        Packet { side: Egress, src: sent.dst, dst: sent.src, ..sent.clone() }.frame()
    );
}

/// What both ways to translate a packet make of it: the one for plain packets and the one for all. `None` if it is
/// none for the first.
fn translated<F: HostFamily>(
    frame: &[u8],
    unfinished: bool,
    [client, pod]: [SocketAddr; 2],
) -> Option<[Vec<u8>; 2]> {
    let end = |at: SocketAddr| (F::address(at.ip()).unwrap(), Port::new(at.port()));
    let mut buffers = [Buffer::new(frame), Buffer::new(frame)];
    buffers.iter_mut().for_each(|buffer| buffer.unfinished = unfinished);
    buffers.iter_mut().for_each(|buffer| buffer.want(frame.len()));
    let (plain, key) = F::plain(&mut buffers[0], Ingress).expect("it is plain");
    let other = FlowKey::<F>::new(end(pod), end(client), key.proto, Egress);
    let change = rewrite::Change::of(&key, &other)?;
    rewrite::translate_plain(&mut buffers[0], plain, &other, &change).unwrap();
    let l4 = Buffer::NETWORK + F::HEADER;
    rewrite::translate(&mut buffers[1], l4, key.proto, Part::Whole, &key, &other).unwrap();
    Some(buffers.map(|buffer| buffer.bytes))
}

/// The Internet checksum of an address, in which both zeros are one.
fn sum_of(ip: IpAddr) -> u32 {
    match ip {
        IpAddr::V4(ip) => checksum::sum(&ip.octets()) % 0xffff,
        IpAddr::V6(ip) => checksum::sum(&ip.octets()) % 0xffff,
    }
}

/// An IPv4 address with its halves in the other order, which changes no sum; another stays as it is.
fn turned(ip: IpAddr) -> IpAddr {
    match ip {
        IpAddr::V4(ip) => {
            let [a, b, c, d] = ip.octets();
            [c, d, a, b].into()
        }
        IpAddr::V6(_) => ip,
    }
}

fn no_panic<F: HostFamily>(frames: &[Vec<u8>]) {
    let mut host = Host::<F>::new();
    let services = cases().into_iter().flat_map(|case| case.steps).find_map(|step| match step {
        Step::Services(services) if F::address(services[0].frontend.ip()).is_some() => {
            Some(services)
        }
        _ => None,
    });
    host.serve(&services.unwrap());
    for frame in frames {
        for hook in [Hook::Ingress, Hook::Uplink, Hook::Egress] {
            let (outcome, after) = host.see(hook, frame);
            if matches!(outcome, Outcome::NotService | Outcome::Malformed) {
                assert!(after == *frame, "{outcome:?} was touched");
            }
        }
    }
}

/// Frames of the cases, with a few bytes changed and the end cut off.
fn any_frames() -> impl Strategy<Value = Vec<Vec<u8>>> {
    let frames: Vec<Vec<u8>> = cases()
        .into_iter()
        .flat_map(|case| case.steps)
        .filter_map(|step| match step {
            Step::Packet { frame, .. } => Some(frame),
            Step::Services(_) => None,
        })
        .collect();
    let change = (any::<prop::sample::Index>(), any::<u8>());
    let changes = proptest::collection::vec(change, 0..4);
    let frame =
        (prop::sample::select(frames), changes, any::<prop::sample::Index>(), any::<bool>());
    let frame = frame.prop_map(|(mut frame, changes, end, cut)| {
        for (place, value) in changes {
            let place = place.index(frame.len());
            frame[place] = value;
        }
        if cut {
            frame.truncate(end.index(frame.len() + 1));
        }
        frame
    });
    proptest::collection::vec(frame, 1..12)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn what_goes_there_and_back_is_what_was_sent(
        (packet, pod) in any_ends().prop_flat_map(|[client, vip, pod]| (any_packet(client, vip), Just(pod)))
    ) {
        if pod.is_ipv4() {
            there_and_back::<V4>(&packet, pod);
        } else {
            there_and_back::<V6>(&packet, pod);
        }
    }

    #[test]
    fn a_plain_packet_is_translated_as_any_other(
        (mut packet, pod) in any_ends().prop_flat_map(|[client, vip, pod]| (any_packet(client, vip), Just(pod))),
        checksum in prop_oneof![any::<u16>(), Just(0), Just(0xffff)],
        unfinished in any::<bool>(),
        same_sum in any::<bool>(),
        same_port in any::<bool>(),
    ) {
        packet.options = false;
        let ip = if same_sum { turned(packet.dst.ip()) } else { pod.ip() };
        let pod = SocketAddr::new(ip, if same_port { packet.dst.port() } else { pod.port() });
        let mut frame = packet.frame();
        let header = if pod.is_ipv4() { 20 } else { 40 };
        let place = 14 + header + if matches!(packet.transport, Transport::Tcp { .. }) { 16 } else { 6 };
        frame[place..place + 2].copy_from_slice(&checksum.to_ne_bytes());
        let ends = [packet.src, pod];
        let both = if pod.is_ipv4() {
            translated::<V4>(&frame, unfinished, ends)
        } else {
            translated::<V6>(&frame, unfinished, ends)
        };
        if let Some([plain, general]) = both {
            prop_assert_eq!(plain, general);
        } else {
            prop_assert_eq!(sum_of(packet.dst.ip()), sum_of(pod.ip()));
        }
    }

    #[test]
    fn no_packet_makes_it_panic(frames in any_frames()) {
        no_panic::<V4>(&frames);
        no_panic::<V6>(&frames);
    }

    #[test]
    fn no_two_flows_are_mixed_up(ports in proptest::collection::vec((0..3_u8, 1000..1004_u16, 0..2_u8), 1..40)) {
        let mut host = Host::<V4>::new();
        let vips = [vip(), at("10.96.0.2:80")];
        let services = vips.map(|frontend| Service::new(frontend, proto::UDP, &[pod()]));
        host.serve(&services);
        let mut seen_as = BTreeMap::new();
        for (client, port, vip) in ports {
            let client = SocketAddr::from(([10, 0, 0, client], port));
            let vip = vips[usize::from(vip)];
            let (_, arrived) = host.see(Hook::Ingress, &Packet::udp(Ingress, client, vip).frame());
            let port = u16::from_be_bytes(arrived[34..36].try_into().unwrap());
            let flow = (client, vip);
            let known = seen_as.insert((client.ip(), port), flow);
            prop_assert!(known.is_none_or(|known| known == flow), "the pod can't tell them apart");
        }
        for ((ip, port), (client, vip)) in seen_as {
            let answer = Packet::udp(Egress, pod(), SocketAddr::new(ip, port));
            let (_, returned) = host.see(Hook::Egress, &answer.frame());
            let wanted = Packet { src: vip, dst: client, ..answer };
            prop_assert_eq!(returned, wanted.frame());
        }
    }
}
