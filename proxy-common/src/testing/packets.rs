//! Packets, built with etherparse: header by header, every checksum computed from the whole.

use std::net::{IpAddr, SocketAddr};

use etherparse::{
    Ethernet2Header, Icmpv4Type, Icmpv6Type, IpFragOffset, IpNumber, Ipv4Header,
    Ipv6FragmentHeader, Ipv6Header, NetSlice, SlicedPacket, TcpHeader, TransportSlice, UdpHeader,
};

use crate::proto;
use crate::tables::Side;

/// Link-layer addresses of a pod and of its node.
const POD: [u8; 6] = [2, 0, 0, 0, 0, 1];
const NODE: [u8; 6] = [2, 0, 0, 0, 0, 2];
/// The identification of fragmented datagrams.
const ID: u16 = 0x1234;

/// What is in an IP packet.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Transport {
    /// TCP (RFC 9293) with flags, sequence and acknowledgement number.
    Tcp {
        /// FIN 1, SYN 2, RST 4, ACK 16.
        flags: u8,
        /// Sequence number.
        sequence: u32,
        /// Acknowledgement number.
        acknowledgement: u32,
        /// Receive window.
        window: u16,
    },
    /// UDP.
    Udp,
    /// UDP with a checksum of zero (RFC 768).
    UdpUnsummed,
    /// SCTP (RFC 9260) with a verification tag and the payload for its chunks.
    Sctp,
    /// SCTP whose checksum is left to hardware: zero.
    SctpUnsummed,
    /// An ICMP or `ICMPv6` message: type, code and the four bytes behind the checksum. The payload of
    /// an error is the packet that it quotes; ports mean nothing.
    Icmp {
        /// The type.
        kind: u8,
        /// The code.
        code: u8,
        /// The four bytes behind the checksum.
        rest: [u8; 4],
    },
}

/// A packet to build.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Packet {
    /// The hook at which it is seen, which says the direction of its link-layer addresses.
    pub side: Side,
    /// Source address and port.
    pub src: SocketAddr,
    /// Destination address and port.
    pub dst: SocketAddr,
    /// What is in it.
    pub transport: Transport,
    /// With IPv4 options, or IPv6 extension headers.
    pub options: bool,
    /// Time to live, or hop limit.
    pub hops: u8,
    /// What the transport carries.
    pub payload: Vec<u8>,
}

impl Packet {
    /// A TCP segment with a few bytes.
    pub fn tcp(side: Side, src: SocketAddr, dst: SocketAddr, flags: u8) -> Self {
        // Whoever acknowledges has heard a SYN of that number.
        let (sequence, acknowledgement) = (1000, if flags & 16 == 0 { 0 } else { 1001 });
        let transport = Transport::Tcp { flags, sequence, acknowledgement, window: 512 };
        let payload = if flags & 2 == 0 { b"hello".to_vec() } else { Vec::new() };
        Self { side, src, dst, transport, options: false, hops: 64, payload }
    }

    /// A UDP datagram with a few bytes.
    pub fn udp(side: Side, src: SocketAddr, dst: SocketAddr) -> Self {
        let payload = b"hello, hello".to_vec();
        Self { side, src, dst, transport: Transport::Udp, options: false, hops: 64, payload }
    }

    /// An ICMP message.
    pub fn icmp(side: Side, src: IpAddr, dst: IpAddr, head: [u8; 2], payload: Vec<u8>) -> Self {
        let (src, dst) = (SocketAddr::new(src, 0), SocketAddr::new(dst, 0));
        let transport = Transport::Icmp { kind: head[0], code: head[1], rest: [0; 4] };
        Self { side, src, dst, transport, options: false, hops: 64, payload }
    }

    /// The same packet with IPv4 options or IPv6 extension headers.
    #[must_use]
    pub fn with_options(self) -> Self {
        Self { options: true, ..self }
    }

    /// The same packet with another payload.
    #[must_use]
    pub fn with_payload(self, payload: &[u8]) -> Self {
        Self { payload: payload.to_vec(), ..self }
    }

    /// The same ICMP message with other bytes behind its checksum.
    ///
    /// # Panics
    /// If it is none.
    #[must_use]
    pub fn with_rest(self, bytes: [u8; 4]) -> Self {
        let Transport::Icmp { kind, code, .. } = self.transport else { panic!("not ICMP") };
        Self { transport: Transport::Icmp { kind, code, rest: bytes }, ..self }
    }

    /// The same TCP segment with another sequence and acknowledgement number.
    ///
    /// # Panics
    /// If it is none.
    #[must_use]
    pub fn with_numbers(self, [sequence, acknowledgement]: [u32; 2]) -> Self {
        let Transport::Tcp { flags, window, .. } = self.transport else { panic!("not TCP") };
        Self { transport: Transport::Tcp { flags, sequence, acknowledgement, window }, ..self }
    }

    /// The frame as it is seen at the hook.
    pub fn frame(&self) -> Vec<u8> {
        let transport = self.transport_bytes();
        self.wrap(&transport, None)
    }

    /// The IP packet without its link-layer header, cut to `length`, as an ICMP error quotes it.
    pub fn quoted(&self, length: usize) -> Vec<u8> {
        let mut bytes = self.frame().split_off(Ethernet2Header::LEN);
        bytes.truncate(length);
        bytes
    }

    /// Two fragments: the transport's first `at` bytes, a multiple of eight, and the rest.
    pub fn fragments(&self, at: u16) -> [Vec<u8>; 2] {
        let transport = self.transport_bytes();
        let (first, rest) = transport.split_at(usize::from(at));
        [self.wrap(first, Some((0, true))), self.wrap(rest, Some((at, false)))]
    }

    fn transport_bytes(&self) -> Vec<u8> {
        let (sport, dport) = (self.src.port(), self.dst.port());
        match self.transport {
            Transport::Tcp { flags, sequence, acknowledgement, window } => {
                let mut header = TcpHeader::new(sport, dport, sequence, window);
                header.acknowledgment_number = acknowledgement;
                let set = |bit: u8| flags & bit != 0;
                (header.fin, header.syn, header.rst) = (set(1), set(2), set(4));
                (header.psh, header.ack) = (set(8), set(16));
                header.checksum = match self.ips() {
                    Ips::V4(src, dst) => header.calc_checksum_ipv4_raw(src, dst, &self.payload),
                    Ips::V6(src, dst) => header.calc_checksum_ipv6_raw(src, dst, &self.payload),
                }
                .expect("it is short");
                [&header.to_bytes(), self.payload.as_slice()].concat()
            }
            Transport::Udp | Transport::UdpUnsummed => {
                let length = u16::try_from(8 + self.payload.len()).expect("it is short");
                let mut header =
                    UdpHeader { source_port: sport, destination_port: dport, length, checksum: 0 };
                if self.transport == Transport::Udp {
                    header.checksum = match self.ips() {
                        Ips::V4(src, dst) => header.calc_checksum_ipv4_raw(src, dst, &self.payload),
                        Ips::V6(src, dst) => header.calc_checksum_ipv6_raw(src, dst, &self.payload),
                    }
                    .expect("it is short");
                }
                [header.to_bytes().as_slice(), &self.payload].concat()
            }
            Transport::Sctp | Transport::SctpUnsummed => {
                let ports = [sport.to_be_bytes(), dport.to_be_bytes()].concat();
                let mut bytes = [&ports[..], &[1, 2, 3, 4], &[0; 4], &self.payload].concat();
                if self.transport == Transport::Sctp {
                    let sum = crc::Crc::<u32>::new(&crc::CRC_32_ISCSI).checksum(&bytes);
                    bytes[8..12].copy_from_slice(&sum.to_le_bytes());
                }
                bytes
            }
            Transport::Icmp { kind, code, rest } => self.icmp_bytes(kind, code, rest),
        }
    }

    fn icmp_bytes(&self, type_u8: u8, code_u8: u8, bytes5to8: [u8; 4]) -> Vec<u8> {
        let payload = &self.payload;
        let (head, checksum) = match self.ips() {
            Ips::V4(..) => {
                let message = Icmpv4Type::Unknown { type_u8, code_u8, bytes5to8 };
                ([type_u8, code_u8], message.calc_checksum(payload))
            }
            Ips::V6(src, dst) => {
                let message = Icmpv6Type::Unknown { type_u8, code_u8, bytes5to8 };
                let checksum = message.calc_checksum(src, dst, payload).expect("it is short");
                ([type_u8, code_u8], checksum)
            }
        };
        [&head[..], &checksum.to_be_bytes(), &bytes5to8, payload].concat()
    }

    fn protocol(&self) -> u8 {
        match (&self.transport, self.src.is_ipv4()) {
            (Transport::Tcp { .. }, _) => proto::TCP,
            (Transport::Udp | Transport::UdpUnsummed, _) => proto::UDP,
            (Transport::Sctp | Transport::SctpUnsummed, _) => proto::SCTP,
            (Transport::Icmp { .. }, true) => proto::ICMP,
            (Transport::Icmp { .. }, false) => proto::ICMPV6,
        }
    }

    fn ips(&self) -> Ips {
        match (self.src.ip(), self.dst.ip()) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => Ips::V4(src.octets(), dst.octets()),
            (IpAddr::V6(src), IpAddr::V6(dst)) => Ips::V6(src.octets(), dst.octets()),
            (src, dst) => panic!("{src} and {dst} are of two families"),
        }
    }

    /// Link-layer and IP headers in front of `transport`, which is a fragment (offset in bytes, and
    /// whether more follow) or all of it.
    fn wrap(&self, transport: &[u8], fragment: Option<(u16, bool)>) -> Vec<u8> {
        let (source, destination) = match self.side {
            Side::Ingress => (POD, NODE),
            Side::Egress => (NODE, POD),
        };
        let ether_type = if self.src.is_ipv4() { 0x0800 } else { 0x86dd }.into();
        let link = Ethernet2Header { source, destination, ether_type };
        let network = match self.ips() {
            Ips::V4(src, dst) => self.ipv4(src, dst, transport.len(), fragment),
            Ips::V6(src, dst) => self.ipv6(src, dst, transport.len(), fragment),
        };
        [link.to_bytes().as_slice(), &network, transport].concat()
    }

    fn ipv4(
        &self,
        src: [u8; 4],
        dst: [u8; 4],
        length: usize,
        part: Option<(u16, bool)>,
    ) -> Vec<u8> {
        let mut header =
            Ipv4Header::new(0, self.hops, IpNumber(self.protocol()), src, dst).expect("valid");
        if self.options {
            // Router alert (RFC 2113) and three no-operations with their end.
            header.options = [0x94, 4, 0, 0, 1, 1, 1, 0].into();
        }
        if let Some((offset, more)) = part {
            (header.identification, header.dont_fragment) = (ID, false);
            header.more_fragments = more;
            header.fragment_offset = IpFragOffset::try_new(offset / 8).expect("it is short");
        }
        header.set_payload_len(length).expect("it is short");
        header.header_checksum = header.calc_header_checksum();
        header.to_bytes().to_vec()
    }

    fn ipv6(
        &self,
        source: [u8; 16],
        destination: [u8; 16],
        length: usize,
        part: Option<(u16, bool)>,
    ) -> Vec<u8> {
        let mut chain: Vec<(u8, Vec<u8>)> = Vec::new();
        if self.options {
            // Padding, in a hop-by-hop header of 8 bytes and destination options of 16.
            chain.push((0, vec![0, 0, 1, 4, 0, 0, 0, 0]));
            chain.push((60, [vec![0, 1, 1, 12], vec![0; 12]].concat()));
        }
        if let Some((offset, more)) = part {
            let offset = IpFragOffset::try_new(offset / 8).expect("it is short");
            let header = Ipv6FragmentHeader::new(IpNumber(0), offset, more, ID.into());
            chain.push((44, header.to_bytes().to_vec()));
        }
        let mut next = self.protocol();
        for (number, bytes) in chain.iter_mut().rev() {
            (bytes[0], next) = (next, *number);
        }
        let extensions: Vec<u8> = chain.into_iter().flat_map(|(_, bytes)| bytes).collect();
        let header = Ipv6Header {
            payload_length: u16::try_from(extensions.len() + length).expect("it is short"),
            next_header: IpNumber(next),
            hop_limit: self.hops,
            source,
            destination,
            ..Ipv6Header::default()
        };
        [header.to_bytes().as_slice(), &extensions].concat()
    }
}

enum Ips {
    V4([u8; 4], [u8; 4]),
    V6([u8; 16], [u8; 16]),
}

/// Who sends a frame with a TCP segment or a UDP datagram, and to whom.
///
/// # Panics
/// If it is something else.
pub fn ends(frame: &[u8]) -> [SocketAddr; 2] {
    let packet = SlicedPacket::from_ethernet(frame).expect("a frame");
    let (src, dst): (IpAddr, IpAddr) = match packet.net.expect("an IP packet") {
        NetSlice::Ipv4(ip) => {
            (ip.header().source_addr().into(), ip.header().destination_addr().into())
        }
        NetSlice::Ipv6(ip) => {
            (ip.header().source_addr().into(), ip.header().destination_addr().into())
        }
        NetSlice::Arp(_) => panic!("ARP has no ports"),
    };
    let (sport, dport) = match packet.transport.expect("a transport header") {
        TransportSlice::Tcp(tcp) => (tcp.source_port(), tcp.destination_port()),
        TransportSlice::Udp(udp) => (udp.source_port(), udp.destination_port()),
        _ => panic!("neither TCP nor UDP"),
    };
    [SocketAddr::new(src, sport), SocketAddr::new(dst, dport)]
}

/// Whether every checksum of a whole packet is right, computed anew by etherparse.
pub fn is_valid(frame: &[u8]) -> bool {
    let Ok(packet) = SlicedPacket::from_ethernet(frame) else { return false };
    let transport = packet.transport.as_ref();
    match &packet.net {
        Some(NetSlice::Ipv4(ip)) => {
            let header = ip.header().to_header();
            header.header_checksum == header.calc_header_checksum()
                && transport.is_some_and(|t| is_sum_right4(t, header.source, header.destination))
        }
        Some(NetSlice::Ipv6(ip)) => {
            let header = ip.header().to_header();
            transport.is_some_and(|t| is_sum_right6(t, header.source, header.destination))
        }
        _ => false,
    }
}

fn is_sum_right4(transport: &TransportSlice<'_>, src: [u8; 4], dst: [u8; 4]) -> bool {
    match transport {
        TransportSlice::Tcp(tcp) => tcp.calc_checksum_ipv4(src, dst) == Ok(tcp.checksum()),
        TransportSlice::Udp(udp) => {
            let header = udp.to_header();
            header.checksum == 0
                || header.calc_checksum_ipv4_raw(src, dst, udp.payload()) == Ok(header.checksum)
        }
        TransportSlice::Icmpv4(icmp) => {
            icmp.icmp_type().calc_checksum(icmp.payload()) == icmp.checksum()
        }
        TransportSlice::Icmpv6(_) | TransportSlice::Igmp(_) => false,
    }
}

fn is_sum_right6(transport: &TransportSlice<'_>, src: [u8; 16], dst: [u8; 16]) -> bool {
    match transport {
        TransportSlice::Tcp(tcp) => tcp.calc_checksum_ipv6(src, dst) == Ok(tcp.checksum()),
        TransportSlice::Udp(udp) => {
            let header = udp.to_header();
            header.calc_checksum_ipv6_raw(src, dst, udp.payload()) == Ok(header.checksum)
        }
        TransportSlice::Icmpv6(icmp) => icmp.is_checksum_valid(src, dst),
        TransportSlice::Icmpv4(_) | TransportSlice::Igmp(_) => false,
    }
}
