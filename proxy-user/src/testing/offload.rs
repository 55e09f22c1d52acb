//! What `ethtool -K` does: a link's offloads.

use std::io;
use std::net::UdpSocket;
use std::os::fd::AsRawFd;

const SIOCETHTOOL: libc::c_ulong = 0x8946;
/// Receive checksums, transmit checksums, segmentation, generic segmentation (`ETHTOOL_S*`).
const COMMANDS: [u32; 4] = [0x15, 0x17, 0x1f, 0x24];

/// `struct ethtool_value`.
#[repr(C)]
struct Value {
    command: u32,
    data: u32,
}

/// Switches the offloads of a link in the calling thread's namespace.
pub fn set(link: &str, on: bool) -> io::Result<()> {
    let socket = UdpSocket::bind(("127.0.0.1", 0))?;
    for command in COMMANDS {
        let mut value = Value { command, data: on.into() };
        // SAFETY: all-zero bytes are a valid ifreq.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        for (to, from) in request.ifr_name.iter_mut().take(libc::IFNAMSIZ - 1).zip(link.bytes()) {
            *to = from.cast_signed();
        }
        request.ifr_ifru.ifru_data = (&raw mut value).cast();
        // SAFETY: the request and the value that it points to are live and of the layout that the
        // call asks for.
        let result = unsafe { libc::ioctl(socket.as_raw_fd(), SIOCETHTOOL, &raw mut request) };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}
