//! What is not let in before the host stack: what tc would drop, and floods of new connections.

use std::net::SocketAddr;

use etherparse::SlicedPacket;
use proxy_common::settings::Guard;
use proxy_common::tables::ServiceValue;
use proxy_common::tables::Side::Ingress;
use proxy_common::testing::{Hook, Packet, Service, ends, is_valid};
use proxy_common::{Outcome, V4, V6, proto};
use proxy_ebpf::testing::{Host, HostFamily};

use crate::{ACK, RST, SYN, at, over_both};

const LIMIT: u32 = 3;

/// A load balancer's IP with a pod elsewhere, and who asks there.
struct Door<F: HostFamily> {
    host: Host<F>,
    vip: SocketAddr,
    client: SocketAddr,
}

impl<F: HostFamily> Door<F> {
    fn new(flags: u32) -> Self {
        let is_v4 = F::BITS == 32;
        let [client, vip, pod] = if is_v4 {
            ["198.51.100.9:40000", "203.0.113.10:80", "10.244.0.7:8080"]
        } else {
            ["[2001:db8:9::9]:40000", "[2001:db8:a::10]:80", "[fd00:244::7]:8080"]
        };
        let mut host = Host::<F>::new();
        let (vip, client) = (at(vip), at(client));
        let service = |number| Service { flags, ..Service::new(vip, number, &[at(pod)]) };
        host.serve(&[service(proto::TCP), service(proto::UDP)]);
        Self { host, vip, client }
    }

    /// One that challenges in a flood, which there is.
    fn flooded() -> Self {
        let mut this = Self::new(0);
        this.host.settings.guard = Guard { limit: LIMIT, key: [1, 2, 3, 4] };
        for number in 0..LIMIT {
            let client = SocketAddr::new(this.client.ip(), 1000 + u16::try_from(number).unwrap());
            assert_eq!(this.at_xdp(&Packet::tcp(Ingress, client, this.vip, SYN)), None);
        }
        this
    }

    fn segment(&self, flags: u8) -> Packet {
        Packet::tcp(Ingress, self.client, self.vip, flags)
    }

    fn at_xdp(&self, packet: &Packet) -> Option<Outcome> {
        self.host.at_xdp(&packet.frame()).map(|(outcome, _)| outcome)
    }

    /// The challenge to a SYN.
    fn challenge(&self) -> Challenge {
        let (outcome, frame) = self.host.at_xdp(&self.segment(SYN).frame()).unwrap();
        assert_eq!(outcome, Outcome::Challenged);
        assert!(is_valid(&frame), "checksums and lengths");
        assert_eq!(ends(&frame), [self.vip, self.client]);
        let packet = SlicedPacket::from_ethernet(&frame).unwrap();
        let Some(etherparse::TransportSlice::Tcp(tcp)) = packet.transport else { panic!() };
        assert!(tcp.syn() && tcp.ack() && tcp.options().is_empty() && tcp.payload().is_empty());
        Challenge { number: tcp.acknowledgment_number() }
    }
}

/// What a client is asked by.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Challenge {
    number: u32,
}

impl Challenge {
    /// The reset that a client answers by (RFC 9293, 3.10.7.3), from this end.
    fn answered(self, client: SocketAddr, vip: SocketAddr) -> Packet {
        Packet::tcp(Ingress, client, vip, RST).with_numbers([self.number, 0])
    }
}

fn policies_drop_before_the_stack<F: HostFamily>() {
    for (flags, outcome) in [
        (ServiceValue::SOURCE_RANGES, Outcome::NotAllowed),
        (ServiceValue::LOCAL_FOR_OUTSIDE, Outcome::NoLocal),
    ] {
        let this = Door::<F>::new(flags);
        let datagram = Packet::udp(Ingress, this.client, this.vip);
        for packet in [this.segment(SYN), datagram] {
            assert_eq!(this.at_xdp(&packet), Some(outcome));
            assert_eq!(this.host.see(Hook::Uplink, &packet.frame()).0, outcome, "as at tc");
        }
        // In the middle of a connection more must be known than is looked at here.
        assert_eq!(this.at_xdp(&this.segment(ACK)), None);
    }
}

#[test]
fn policies_drop_before_the_stack_of_both_families() {
    over_both([policies_drop_before_the_stack::<V4>, policies_drop_before_the_stack::<V6>]);
}

fn a_flow_goes_on_though_policies_have_changed<F: HostFamily>() {
    let mut this = Door::<F>::new(0);
    let packets = [this.segment(SYN), Packet::udp(Ingress, this.client, this.vip)];
    for packet in &packets {
        assert_eq!(this.host.see(Hook::Uplink, &packet.frame()).0, Outcome::Opened);
    }
    let stricter = Door::<F>::new(ServiceValue::SOURCE_RANGES);
    let pod = at(if F::BITS == 32 { "10.244.0.7:8080" } else { "[fd00:244::7]:8080" });
    let flags = ServiceValue::SOURCE_RANGES;
    this.host.serve(
        &[proto::TCP, proto::UDP]
            .map(|number| Service { flags, ..Service::new(stricter.vip, number, &[pod]) }),
    );
    for packet in &packets {
        assert_eq!(this.at_xdp(packet), None);
    }
}

#[test]
fn a_flow_goes_on_though_policies_have_changed_of_both_families() {
    over_both([
        a_flow_goes_on_though_policies_have_changed::<V4>,
        a_flow_goes_on_though_policies_have_changed::<V6>,
    ]);
}

fn in_a_flood_who_answers_is_let_in<F: HostFamily>() {
    let this = Door::<F>::flooded();
    let challenge = this.challenge();
    assert_eq!(this.challenge(), challenge, "it is not remembered, but made again");
    assert_eq!(this.host.embryos().len(), 0, "nothing is kept of him");
    // Four ticks later, too, when others are asked by another number.
    this.host.now.set(this.host.now.get() + 4);
    assert_eq!(this.at_xdp(&challenge.answered(this.client, this.vip)), Some(Outcome::Verified));
    assert_eq!(this.at_xdp(&this.segment(SYN)), None);
    // Another connection is asked again, and so is this one later.
    let other = SocketAddr::new(this.client.ip(), 50_000);
    let syn = Packet::tcp(Ingress, other, this.vip, SYN);
    for _ in 0..LIMIT {
        let _ = this.at_xdp(&syn);
    }
    assert_eq!(this.at_xdp(&syn), Some(Outcome::Challenged));
    for (ticks, outcome) in [(8, None), (1, Some(Outcome::Challenged))] {
        this.host.now.set(this.host.now.get() + ticks);
        for _ in 0..LIMIT {
            let _ = this.at_xdp(&syn);
        }
        assert_eq!(this.at_xdp(&this.segment(SYN)), outcome);
    }
}

#[test]
fn in_a_flood_who_answers_is_let_in_of_both_families() {
    over_both([in_a_flood_who_answers_is_let_in::<V4>, in_a_flood_who_answers_is_let_in::<V6>]);
}

fn nobody_answers_for_another<F: HostFamily>() {
    let this = Door::<F>::flooded();
    let challenge = this.challenge();
    let other = SocketAddr::new(
        if F::BITS == 32 { at("198.51.100.10:1") } else { at("[2001:db8:9::a]:1") }.ip(),
        this.client.port(),
    );
    let other_port = SocketAddr::new(this.client.ip(), 50_000);
    for client in [other, other_port] {
        assert_eq!(this.at_xdp(&challenge.answered(client, this.vip)), None);
    }
    for wrong in [1, 2, 1 << 31] {
        let guess = Challenge { number: challenge.number ^ wrong };
        assert_eq!(this.at_xdp(&guess.answered(this.client, this.vip)), None);
    }
    // By then the number is another.
    this.host.now.set(this.host.now.get() + 8);
    assert_eq!(this.at_xdp(&challenge.answered(this.client, this.vip)), None);
    assert_eq!(this.at_xdp(&this.segment(SYN)), None, "no flood any more");
    assert!(this.host.verified.borrow().is_empty());
}

#[test]
fn nobody_answers_for_another_of_both_families() {
    over_both([nobody_answers_for_another::<V4>, nobody_answers_for_another::<V6>]);
}

fn what_has_begun_is_not_challenged<F: HostFamily>() {
    let mut this = Door::<F>::flooded();
    let guard = std::mem::replace(&mut this.host.settings.guard, Guard { limit: 0, key: [0; 4] });
    this.host.see(Hook::Uplink, &this.segment(SYN).frame());
    this.host.settings.guard = guard;
    for flags in [SYN, ACK, RST, RST | ACK] {
        assert_eq!(this.at_xdp(&this.segment(flags)), None);
    }
    let datagram = Packet::udp(Ingress, this.client, this.vip);
    assert_eq!(this.at_xdp(&datagram), None, "no datagram is");
}

#[test]
fn what_has_begun_is_not_challenged_of_both_families() {
    over_both([what_has_begun_is_not_challenged::<V4>, what_has_begun_is_not_challenged::<V6>]);
}

/// In a shape that is not looked at before the host stack, and so can't be challenged.
fn no_shape_evades<F: HostFamily>() {
    let this = Door::<F>::flooded();
    let syn = |port| {
        let client = SocketAddr::new(this.client.ip(), port);
        Packet::tcp(Ingress, client, this.vip, SYN)
    };
    let odd = |port| [syn(port).with_options(), Packet { hops: 1, ..syn(port + 100) }];
    let at_tc = |packet: &Packet| this.host.see(Hook::Uplink, &packet.frame()).0;
    assert_eq!(odd(1).map(|packet| at_tc(&packet)), [Outcome::Opened; 2], "as many as may");
    this.challenge();
    assert_eq!(odd(2).map(|packet| at_tc(&packet)), [Outcome::Silent; 2]);
    assert_ne!(at_tc(&odd(1)[0]), Outcome::Silent, "sent again, of a flow that is known");
    this.host.now.set(this.host.now.get() + 1);
    assert_eq!(odd(3).map(|packet| at_tc(&packet)), [Outcome::Opened; 2], "the flood is over");
}

#[test]
fn no_shape_evades_of_both_families() {
    over_both([no_shape_evades::<V4>, no_shape_evades::<V6>]);
}

/// A frame for many hosts is answered by none of them.
#[test]
fn what_is_sent_to_many_is_not_challenged() {
    let this = Door::<V4>::flooded();
    let mut frame = this.segment(SYN).frame();
    frame[0] |= 1;
    assert_eq!(this.host.at_xdp(&frame), None);
}

/// Where the number happens to be the one that would be taken for an acknowledgement.
#[test]
fn no_challenge_acknowledges() {
    let this = Door::<V4>::flooded();
    let number = this.challenge().number;
    let syn = this.segment(SYN).with_numbers([number.wrapping_sub(1), 0]);
    let (outcome, frame) = this.host.at_xdp(&syn.frame()).unwrap();
    assert_eq!((outcome, frame), (Outcome::Silent, syn.frame()));
}
