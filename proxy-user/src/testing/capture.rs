//! A tcpdump of our own: what passes a link, as lines.

use std::io;
use std::net::IpAddr;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;

use etherparse::{NetSlice, SlicedPacket, TransportSlice};

use super::namespace::Namespace;

/// A TCP or UDP packet that was seen.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Seen {
    /// "TCP" or "UDP".
    pub protocol: &'static str,
    /// Source address.
    pub src: IpAddr,
    /// Source port.
    pub sport: u16,
    /// Destination address.
    pub dst: IpAddr,
    /// Destination port.
    pub dport: u16,
    /// It opens a connection.
    pub syn: bool,
    /// It resets one.
    pub rst: bool,
}

/// A capture under way on a link.
pub struct Capture {
    seen: Arc<Mutex<Vec<Seen>>>,
    stop: Arc<AtomicBool>,
}

impl Capture {
    /// Starts to capture on a link of a namespace.
    pub fn start(namespace: &Namespace, link: &str) -> Self {
        let socket = namespace.run(|| open(link)).expect("packet sockets need root");
        let (seen, stop) = (Arc::new(Mutex::new(Vec::new())), Arc::new(AtomicBool::new(false)));
        let (seen_by, stopped) = (Arc::clone(&seen), Arc::clone(&stop));
        thread::spawn(move || {
            let mut frame = vec![0; 65_536];
            while !stopped.load(Ordering::Relaxed) {
                if let Some(packet) = receive(&socket, &mut frame).and_then(parse) {
                    seen_by.lock().expect("no panic while locked").push(packet);
                }
            }
        });
        Self { seen, stop }
    }

    /// What was seen so far.
    pub fn seen(&self) -> Vec<Seen> {
        self.seen.lock().expect("no panic while locked").clone()
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

fn open(link: &str) -> io::Result<OwnedFd> {
    let all = i32::from(u16::try_from(libc::ETH_P_ALL).expect("16 bits").to_be());
    // SAFETY: plain socket calls; the address is a live, zero-padded struct of its own size.
    unsafe {
        let fd = libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, all);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        let socket = OwnedFd::from_raw_fd(fd);
        let mut address: libc::sockaddr_ll = std::mem::zeroed();
        address.sll_family = u16::try_from(libc::AF_PACKET).expect("16 bits");
        address.sll_protocol = u16::try_from(libc::ETH_P_ALL).expect("16 bits").to_be();
        address.sll_ifindex = i32::try_from(nix::net::if_::if_nametoindex(link)?).expect("31 bits");
        let length = u32::try_from(size_of_val(&address)).expect("small");
        if libc::bind(fd, (&raw const address).cast(), length) < 0 {
            return Err(io::Error::last_os_error());
        }
        // So that the thread sees that it is to stop.
        let patience = libc::timeval { tv_sec: 0, tv_usec: 100_000 };
        let length = u32::try_from(size_of_val(&patience)).expect("small");
        let option = (&raw const patience).cast();
        libc::setsockopt(fd, libc::SOL_SOCKET, libc::SO_RCVTIMEO, option, length);
        Ok(socket)
    }
}

fn receive<'a>(socket: &OwnedFd, frame: &'a mut [u8]) -> Option<&'a [u8]> {
    // SAFETY: the buffer is live and of the length given.
    let length =
        unsafe { libc::recv(socket.as_raw_fd(), frame.as_mut_ptr().cast(), frame.len(), 0) };
    usize::try_from(length).ok().map(|length| &frame[..length])
}

fn parse(frame: &[u8]) -> Option<Seen> {
    let packet = SlicedPacket::from_ethernet(frame).ok()?;
    let (src, dst) = match packet.net? {
        NetSlice::Ipv4(ip) => {
            (ip.header().source_addr().into(), ip.header().destination_addr().into())
        }
        NetSlice::Ipv6(ip) => {
            (ip.header().source_addr().into(), ip.header().destination_addr().into())
        }
        NetSlice::Arp(_) => return None,
    };
    let (protocol, sport, dport, [syn, rst]) = match packet.transport? {
        TransportSlice::Tcp(tcp) => {
            let flags = [tcp.syn() && !tcp.ack(), tcp.rst()];
            ("TCP", tcp.source_port(), tcp.destination_port(), flags)
        }
        TransportSlice::Udp(udp) => ("UDP", udp.source_port(), udp.destination_port(), [false; 2]),
        _ => return None,
    };
    Some(Seen { protocol, src, sport, dst, dport, syn, rst })
}
