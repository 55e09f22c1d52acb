//! Servers in pods: they say who they are and whom they see, then echo.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::thread;

use super::namespace::Namespace;

/// Serves TCP at a port, until the process ends. A connection first hears `<name> <client>\n`, then
/// its own bytes.
pub fn tcp(namespace: &Namespace, name: &str, address: IpAddr, port: u16) {
    let listener = namespace.run(|| TcpListener::bind((address, port)).expect("the port is free"));
    let name = name.to_owned();
    thread::spawn(move || {
        while let Ok((stream, client)) = listener.accept() {
            let greeting = format!("{name} {client}\n");
            thread::spawn(move || echo(stream, &greeting));
        }
    });
}

fn echo(mut stream: TcpStream, greeting: &str) {
    let mut buffer = vec![0; 64 * 1024];
    let mut result = stream.write_all(greeting.as_bytes());
    while result.is_ok() {
        result = match stream.read(&mut buffer) {
            Ok(0) | Err(_) => return,
            Ok(length) => stream.write_all(&buffer[..length]),
        };
    }
}

/// Serves UDP at a port, until the process ends. Each datagram is answered by `<name> <client>\n` and
/// its own bytes.
pub fn udp(namespace: &Namespace, name: &str, address: IpAddr, port: u16) {
    let socket = namespace.run(|| UdpSocket::bind((address, port)).expect("the port is free"));
    let name = name.to_owned();
    thread::spawn(move || {
        let mut buffer = vec![0; 64 * 1024];
        while let Ok((length, client)) = socket.recv_from(&mut buffer) {
            let mut answer = format!("{name} {client}\n").into_bytes();
            answer.extend_from_slice(&buffer[..length]);
            // A client that has gone does not matter.
            let _ = socket.send_to(&answer, client);
        }
    });
}

/// What a server's greeting, the first line of its answer, says: its name, and the client as it sees it.
pub fn parse_greeting(answer: &str) -> (String, SocketAddr) {
    let line = answer.lines().next().unwrap_or_default();
    let (name, client) = line.split_once(' ').expect("a greeting");
    (name.to_owned(), client.parse().expect("an address"))
}
