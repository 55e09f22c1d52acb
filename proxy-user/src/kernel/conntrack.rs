//! The kernel's own table of connections, where it follows any (`nf_conntrack`): what it must know of a connection of which it
//! will see few packets.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use netlink_packet_netfilter::conntrack::{
    ConntrackAttribute, ConntrackMessage, IPTuple, ProtoInfo, ProtoInfoTCP, ProtoTuple, Protocol,
    TCPFlags, Tuple,
};
use netlink_packet_netfilter::{NetfilterHeader, NetfilterMessage, NetfilterProtoFamily};
use nix::sys::socket::setsockopt;
use nix::sys::socket::sockopt::ReceiveTimeout;
use nix::sys::time::{TimeVal, TimeValLike};
use rtnetlink::packet_core::{
    NLM_F_ACK, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload,
};
use rtnetlink::sys::protocols::NETLINK_NETFILTER;
use rtnetlink::sys::{self, Socket};

/// `IP_CT_TCP_FLAG_BE_LIBERAL`: a segment is the connection's, whatever its numbers.
const BE_LIBERAL: u8 = 8;
/// `IP_CT_TCP_FLAG_DATA_UNACKNOWLEDGED`, for which a connection is forgotten after minutes, and `IP_CT_TCP_FLAG_MAXACK_SET`, by
/// which a RST is judged: what it has not seen says neither.
const JUDGED: u8 = 0x10 | 0x20;
/// How long an answer is waited for.
const PATIENCE: Duration = Duration::from_secs(1);
/// How long the kernel's answer may be.
const ANSWER: usize = 4096;

/// A way to the kernel's table of connections.
pub struct Conntrack {
    socket: Socket,
    /// For how many seconds an idle connection is kept; `None` if that is not known.
    idle: Option<u32>,
}

impl Conntrack {
    /// Opens it, of this thread's network namespace.
    ///
    /// # Errors
    /// If netlink can't be used.
    pub fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_NETFILTER)?;
        socket.bind_auto()?;
        socket.connect(&sys::SocketAddr::new(0, 0))?;
        setsockopt(&socket, ReceiveTimeout, &TimeVal::seconds(PATIENCE.as_secs().cast_signed()))?;
        Ok(Self { socket, idle: idle_timeout() })
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
        let message = ConntrackMessage::New(attributes);
        let family =
            if from.is_ipv4() { NetfilterProtoFamily::IPv4 } else { NetfilterProtoFamily::IPv6 };
        let header = NetfilterHeader::new(family, 0, 0);
        match self.ask(NetfilterMessage::new(header, message)) {
            Ok(()) => Ok(true),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Sends a request and waits for its acknowledgement, which the kernel has ready at once.
    fn ask(&self, message: NetfilterMessage) -> io::Result<()> {
        let mut header = NetlinkHeader::default();
        header.flags = NLM_F_REQUEST | NLM_F_ACK;
        let mut request = NetlinkMessage::new(header, NetlinkPayload::from(message));
        request.finalize();
        let mut bytes = vec![0; request.buffer_len()];
        request.serialize(&mut bytes);
        self.socket.send(&bytes, 0)?;
        let mut answer = Vec::with_capacity(ANSWER);
        self.socket.recv(&mut answer, 0)?;
        let answer = NetlinkMessage::<NetfilterMessage>::deserialize(&answer);
        match answer.map_err(io::Error::other)?.payload {
            NetlinkPayload::Error(error) if error.code.is_none() => Ok(()),
            NetlinkPayload::Error(error) => Err(error.to_io()),
            other => Err(io::Error::other(format!("an answer of another kind: {other:?}"))),
        }
    }
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
