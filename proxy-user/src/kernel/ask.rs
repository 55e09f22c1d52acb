//! Questions to the kernel by netlink that are answered at once, for those who can wait for that.

use std::io;
use std::time::Duration;

use nix::sys::socket::setsockopt;
use nix::sys::socket::sockopt::ReceiveTimeout;
use nix::sys::time::{TimeVal, TimeValLike};
use rtnetlink::packet_core::{
    NLM_F_REQUEST, NetlinkDeserializable, NetlinkHeader, NetlinkMessage, NetlinkPayload,
    NetlinkSerializable,
};
use rtnetlink::sys::{Socket, SocketAddr};

/// How many bytes of answers come at once.
const ANSWER: usize = 1 << 16;
/// How long an answer is waited for.
const PATIENCE: Duration = Duration::from_secs(1);
/// Where a message's type lies.
const TYPE: std::ops::Range<usize> = 4..6;

/// A way to ask.
pub struct Asker {
    socket: Socket,
}

impl Asker {
    /// Opens a family of netlink, of this thread's network namespace.
    ///
    /// # Errors
    /// If netlink can't be used.
    pub fn open(family: isize) -> io::Result<Self> {
        let mut socket = Socket::new(family)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        setsockopt(&socket, ReceiveTimeout, &TimeVal::seconds(PATIENCE.as_secs().cast_signed()))?;
        Ok(Self { socket })
    }

    /// Asks, and says what the kernel answers, up to its acknowledgement or the end of its listing: one of both must be asked for by
    /// the flags. `kind` takes the place of the message's own type, if it has none of its own here.
    ///
    /// # Errors
    /// If the kernel refuses, or does not answer.
    pub fn ask<M>(&self, message: M, flags: u16, kind: Option<u16>) -> io::Result<Vec<M>>
    where
        M: NetlinkSerializable + NetlinkDeserializable,
    {
        let mut header = NetlinkHeader::default();
        header.flags = NLM_F_REQUEST | flags;
        let mut request = NetlinkMessage::new(header, NetlinkPayload::InnerMessage(message));
        request.finalize();
        let mut bytes = vec![0; request.buffer_len()];
        request.serialize(&mut bytes);
        if let Some(kind) = kind {
            bytes[TYPE].copy_from_slice(&kind.to_ne_bytes());
        }
        self.socket.send(&bytes, 0)?;
        let mut answers = Vec::new();
        loop {
            let mut received = Vec::with_capacity(ANSWER);
            self.socket.recv(&mut received, 0)?;
            let mut rest = &received[..];
            while !rest.is_empty() {
                let message = NetlinkMessage::<M>::deserialize(rest).map_err(io::Error::other)?;
                match message.payload {
                    NetlinkPayload::Done(_) => return Ok(answers),
                    NetlinkPayload::Error(error) if error.code.is_none() => return Ok(answers),
                    NetlinkPayload::Error(error) => return Err(error.to_io()),
                    NetlinkPayload::InnerMessage(answer) => answers.push(answer),
                    _ => {}
                }
                let length = usize::try_from(message.header.length).map_err(io::Error::other)?;
                rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
            }
        }
    }
}
