//! The kernel's own table of connections, where it follows any (`nf_conntrack`): what it must know of a connection of which it
//! will see few packets.

use std::io;
use std::net::SocketAddr;

use netlink_packet_netfilter::conntrack::{
    ConntrackAttribute, ConntrackMessage, IPTuple, ProtoInfo, ProtoInfoTCP, ProtoTuple, Protocol,
    TCPFlags, Tuple,
};
use netlink_packet_netfilter::{
    NetfilterHeader, NetfilterMessage, NetfilterMessageInner, NetfilterProtoFamily,
};
use rtnetlink::packet_core::NLM_F_ACK;
use rtnetlink::sys::protocols::NETLINK_NETFILTER;

use super::ask::Asker;

/// `IP_CT_TCP_FLAG_BE_LIBERAL`: a segment is the connection's, whatever its numbers.
const BE_LIBERAL: u8 = 8;
/// `IP_CT_TCP_FLAG_DATA_UNACKNOWLEDGED`, for which a connection is forgotten after minutes, and `IP_CT_TCP_FLAG_MAXACK_SET`, by
/// which a RST is judged: what it has not seen says neither.
const JUDGED: u8 = 0x10 | 0x20;

/// A way to the kernel's table of connections.
pub struct Conntrack {
    asker: Asker,
    /// For how many seconds an idle connection is kept; `None` if that is not known.
    idle: Option<u32>,
}

impl Conntrack {
    /// Opens it, of this thread's network namespace.
    ///
    /// # Errors
    /// If netlink can't be used.
    pub fn open() -> io::Result<Self> {
        Ok(Self { asker: Asker::open(NETLINK_NETFILTER)?, idle: idle_timeout() })
    }

    /// Who has begun the TCP connection of which answers go from one address to another. `None` if the kernel knows of none.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn origin_of(&self, from: SocketAddr, to: SocketAddr) -> io::Result<Option<SocketAddr>> {
        let question =
            ConntrackMessage::Get(vec![ConntrackAttribute::CtaTupleReply(tuple(from, to))]);
        let answers = match self.asker.ask(message(from, question), NLM_F_ACK, None) {
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(None),
            answers => answers?,
        };
        let origin = |attribute: &ConntrackAttribute| match attribute {
            ConntrackAttribute::CtaTupleOrig(tuples) => source(tuples),
            _ => None,
        };
        Ok(answers.iter().find_map(|answer| match &answer.inner {
            NetfilterMessageInner::Conntrack(ConntrackMessage::New(attributes)) => {
                attributes.iter().find_map(origin)
            }
            _ => None,
        }))
    }

    /// Says of a TCP connection that it is not to be judged by what was seen of it, so that it is followed to its end though
    /// most of it is not seen, and kept as long as any that is idle. False if the kernel knows of none.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn be_liberal(&self, from: SocketAddr, to: SocketAddr) -> io::Result<bool> {
        let flags = [BE_LIBERAL, BE_LIBERAL | JUDGED];
        let flags = TCPFlags::parse(&flags).map_err(io::Error::other)?;
        let both =
            vec![ProtoInfoTCP::OriginalFlags(flags.clone()), ProtoInfoTCP::ReplyFlags(flags)];
        let mut attributes = vec![
            ConntrackAttribute::CtaTupleOrig(tuple(from, to)),
            ConntrackAttribute::CtaProtoInfo(vec![ProtoInfo::TCP(both)]),
        ];
        attributes.extend(self.idle.map(ConntrackAttribute::CtaTimeout));
        let told = message(from, ConntrackMessage::New(attributes));
        match self.asker.ask(told, NLM_F_ACK, None) {
            Ok(_) => Ok(true),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
            Err(error) => Err(error),
        }
    }
}

/// A message about connections of an address's family.
fn message(of: SocketAddr, message: ConntrackMessage) -> NetfilterMessage {
    let family = if of.is_ipv4() { NetfilterProtoFamily::IPv4 } else { NetfilterProtoFamily::IPv6 };
    NetfilterMessage::new(NetfilterHeader::new(family, 0, 0), message)
}

/// Where a tuple begins.
fn source(tuples: &[Tuple]) -> Option<SocketAddr> {
    let (mut address, mut port) = (None, None);
    for tuple in tuples {
        match tuple {
            Tuple::Ip(parts) => {
                address = parts.iter().find_map(|part| match part {
                    IPTuple::SourceAddress(address) => Some(*address),
                    _ => None,
                });
            }
            Tuple::Proto(parts) => {
                port = parts.iter().find_map(|part| match part {
                    ProtoTuple::SourcePort(port) => Some(*port),
                    _ => None,
                });
            }
            _ => {}
        }
    }
    Some(SocketAddr::new(address?, port?))
}

fn tuple(from: SocketAddr, to: SocketAddr) -> Vec<Tuple> {
    vec![
        Tuple::Ip(vec![IPTuple::SourceAddress(from.ip()), IPTuple::DestinationAddress(to.ip())]),
        Tuple::Proto(vec![
            ProtoTuple::Protocol(Protocol::Tcp),
            ProtoTuple::SourcePort(from.port()),
            ProtoTuple::DestinationPort(to.port()),
        ]),
    ]
}

/// For how many seconds the kernel keeps an idle TCP connection.
fn idle_timeout() -> Option<u32> {
    let name = "/proc/sys/net/netfilter/nf_conntrack_tcp_timeout_established";
    std::fs::read_to_string(name).ok()?.trim().parse().ok()
}

/// Whether the kernel follows connections in this network namespace.
pub fn is_in_use() -> bool {
    let count = std::fs::read_to_string("/proc/sys/net/netfilter/nf_conntrack_count");
    count.is_ok_and(|count| count.trim() != "0")
}
