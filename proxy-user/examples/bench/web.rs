//! A web server that says "ok".

use std::net::Ipv4Addr;
use std::thread;

use portal::testing::namespace::Namespace;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};

const KEPT: &[u8] = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";
const CLOSED: &[u8] = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok";

/// Serves on a thread of its own, as long as the process lives.
pub fn serve(namespace: &Namespace, port: u16) {
    let namespace = namespace.clone();
    thread::spawn(move || {
        namespace.enter();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        tokio::task::LocalSet::new().block_on(&runtime.expect("a runtime"), async move {
            let socket = TcpSocket::new_v4().expect("a socket");
            socket.set_reuseaddr(true).expect("a new socket");
            socket.bind((Ipv4Addr::UNSPECIFIED, port).into()).expect("a free port");
            let listener = socket.listen(4096).expect("it is bound");
            loop {
                // Without a descriptor left the client tries again.
                let Ok((stream, _)) = listener.accept().await else { continue };
                tokio::task::spawn_local(answer(stream));
            }
        });
    });
}

/// Answers requests without a body, which come whole.
async fn answer(mut stream: TcpStream) {
    let _ = stream.set_nodelay(true);
    let mut request = [0; 2048];
    while let Ok(length @ 1..) = stream.read(&mut request).await {
        let is_last = request[..length].windows(5).any(|word| word == b"close");
        let answer = if is_last { CLOSED } else { KEPT };
        if stream.write_all(answer).await.is_err() || is_last {
            return;
        }
    }
}
